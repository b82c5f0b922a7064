"""The attributes of a head: what reading, setting, moving, loading and printing them does."""

import math
import warnings

import torch
from torch import Tensor, nn

from .. import margins, validation
from ..distributed import dtensors
from ..ops import class_tables, formats
from . import float8, margin_buffers


class Attributes(nn.Module):
    """Base class of MarginSoftmaxLoss, whose constructor makes them, and whose own properties are what its users see."""

    _is_fully_sharded = False

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        hard_classes = state_dict.get(f"{prefix}hard_classes")
        if hard_classes is not None:  # also of another k
            self.hard_classes = hard_classes
        float8.convert(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        name = f"{prefix}weight"
        # strict=False is not told to this method. Without the parameter torch.nn.utils.parametrize makes the weight.
        if name not in state_dict and "weight" in self._parameters:
            alike = [key for key, value in state_dict.items() if getattr(value, "shape", None) == self.weight.shape]
            hint = f"; {alike} there have its shape: rename the one that is meant" if alike else ""
            warnings.warn(f"the state dict has no {name}, so the class table keeps its present values{hint}", stacklevel=4)

    def _learn_scale(self, device):
        """Turn the number `scale` into the parameter log_scale."""
        if isinstance(self.scale, Tensor):
            raise ValueError(
                f"learnable_scale=True makes a parameter of a number, got scale = {validation.shown(self.scale)}: an "
                "nn.Parameter is learnt without it"
            )
        self._first_scale = self.__dict__.pop("scale")
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))

    def __getattr__(self, name):
        """The scale that is made of a parameter, or the parameter, buffer or module that nn.Module looks for here."""
        if name == "scale" and self._learns_scale():
            return self.log_scale.exp()
        try:
            return super().__getattr__(name)
        except AttributeError:
            validation.check_attribute(type(self).__name__, name)
            raise

    def __setattr__(self, name, value):
        if name in ("s", "m"):
            validation.check_attribute(type(self).__name__, name)
        if name in ("margin", "negatives"):  # nn.Module would make a tensor that is a Parameter one of its own
            object.__setattr__(self, name, value)
            return
        if name in ("weight", "bias") and not self.placement.makes_shards and dtensors.is_sharded(value):
            self.__dict__["_is_fully_sharded"] = True  # fully_shard, which gathers it for forward
        if name == "hard_classes" and value is not None:
            validation.check_hard_classes(value, self.num_classes)
            value = value.to(value.device if self.weight.is_meta else self.weight.device, torch.int32, copy=True)
        if name == "scale" and self._learns_scale():
            validation.check_scale(value)
            validation.check_scale(float(value))
            with torch.no_grad():
                self.log_scale.fill_(math.log(value))
            return
        if name == "scale" and not isinstance(value, nn.Parameter):
            self.__dict__.get("_parameters", {}).pop("scale", None)  # nn.Module lets no number take a parameter's place
        super().__setattr__(name, value)

    def _learns_scale(self):
        return "log_scale" in self.__dict__.get("_parameters", {})

    def __setstate__(self, state):
        super().__setstate__(state)
        class_tables.register(self)

    def _begin_sampling(self):
        self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def _states(self):
        """The first values of the running statistics of margin and negatives, by name."""
        return {**self._margin().state, **(self._negatives.state if self._negatives else {})}

    def _margin(self):
        """The margin as a Margin. It may have been set since construction, also to something else."""
        return margin_buffers.read(self)

    @staticmethod
    def _as_margin(given):
        """The Margin for a value that `head.margin` was set to."""
        margins.check_kind(given)
        return given

    @staticmethod
    def _as_given(margin):
        """The value that `head.margin` returns for a Margin."""
        return margin

    def _format_of(self, weight):
        return self._table_format if weight.dtype == formats.TABLE_FORMATS[self._table_format] else "float32"

    def _apply(self, function, recurse=True):
        """Move and convert, but leave log_scale float32 at least, and what margin_buffers.restore says."""
        before, row_scale, log_scale = margin_buffers.values(self), self.weight_scale, self._parameters.get("log_scale")
        before |= {name: self._buffers[name] for name in margin_buffers.GIVEN if self._buffers[name] is not None}
        log_scale = None if log_scale is None else log_scale.data
        super()._apply(function, recurse)
        if row_scale is not None:
            float8.restore(self, row_scale)
        margin_buffers.restore(self, before)
        if log_scale is not None and self.log_scale.dtype.itemsize < 4:
            self.log_scale.data = log_scale.to(self.log_scale.device)
        return self

    def extra_repr(self) -> str:
        def unusual(**usual):
            found = {name: getattr(self, name) if name != "bias" else self.bias is not None for name in usual}
            return "".join(f", {name}={value}" for name, value in found.items() if value != usual[name])

        shape = f"{self.weight.shape[1]}, {self.num_classes}"
        sampling = unusual(table_format="float32", sample_rate=1.0, sample_seed=0, sample_correction=False, label_smoothing=0.0)
        form = unusual(bias=False, normalize_features=self._margin().normalize_features, centers_per_class=1, negatives=None)
        scale = self.scale
        if isinstance(scale, Tensor):
            learnt = ", learnable_scale=True" if self._learns_scale() else ""
            scale = f"{'meta' if scale.is_meta else format(scale.item(), '.6g')}{learnt}"
        loss = f"scale={scale}, margin={validation.shown(self.margin)}, reduction={self.reduction!r}"
        return f"{shape}, {loss}{sampling}{self.placement.extra_repr(self)}{form}"
