"""A step of a fused optimiser: the records of backward, checked on all ranks, unscaled, and made into an update of each table."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch

from .. import validation
from ..distributed import dtensors
from ..ops import class_tables, formats, recorded_gradient, recording
from ..ops.table import Table
from . import rules, table_state


class Fused(torch.optim.Optimizer):
    """Base class of the fused optimisers. A subclass defines its rule and the names of its state."""

    _STATE = ()  # names of its buffers of the table's shape
    _COUNTS_STEPS = False  # True: its rule needs the number of steps
    _OPTION = None  # an option that its rule has and others do not
    # torch.amp.GradScaler leaves the division by its scale to such an optimiser.
    _step_supports_amp_scaling = True

    def __init__(self, params, defaults):
        self._complete = False  # the groups are added one by one
        super().__init__(params, defaults)
        self._complete = True
        self._attach()

    def __getstate__(self):
        raise TypeError(f"{type(self).__name__} belongs to its tables and cannot be copied or pickled: save its state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._attach()
            except ValueError:
                self.param_groups.pop()
                raise

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise for options of a group, given here or loaded, of the wrong type or value."""
        for name in ("lr", "weight_decay"):
            validation.check_at_least_zero(name, number(name, options[name]))
        if options["max_row_norm"] is not None:
            validation.check_more_than_zero("max_row_norm", number("max_row_norm", options["max_row_norm"]))
        validation.check_choice("state_format", options["state_format"], formats.STATE_FORMATS)
        validation.check_integer("seed", options["seed"])

    def _attach(self):
        self._tables = self._find_tables()
        for weight, bias in self._tables:
            recording.attach(weight, bias, self)

    @property
    def skipped_steps(self) -> int:
        """The number of steps that changed nothing, because a loss or a gradient was not finite."""
        return max((int(self.state[weight].get("skipped", 0)) for weight, _ in self._tables), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step from the records of backward since the last one, and forget them.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: the table has an ordinary gradient too, or was changed between backward and step; `unscale_` of a
                GradScaler was called for this optimiser; the step before was interrupted, by Ctrl-C or an error, so that some
                rows are a step ahead of others: load table and optimiser from a checkpoint, or make the optimiser again to go on
                from the table as it is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_empty_step():
            self._allocate()
            return loss
        self._on_all_ranks(self._check)
        finite = self._finite([record.factors for weight, _ in self._tables for record in recording.pending(weight).records])
        for weight, bias in self._tables:
            pending = recording.pending(weight)
            if pending.records or not len(dtensors.local(weight)):  # a rank without rows counts and keeps state as others do
                self.state[weight][table_state.INTERRUPTED] = True  # from the loss of the records to the last slab
                self._step_table(weight, bias, [self._unscaled(record) for record in pending.take()], finite)
                del self.state[weight][table_state.INTERRUPTED]
        return loss

    def _is_empty_step(self):
        """True for the step by which torch.distributed.checkpoint.state_dict has an optimiser allocate its state: the first one,
        at a learning rate of 0, with a gradient of zeros for every parameter. Raises if a backward is recorded, which the
        zero_grad after that step would lose.
        """
        parameters = [each for pair in self._tables for each in pair if each is not None and each.requires_grad]
        is_empty = (
            not self.state
            and all(number("lr", group["lr"]) == 0 for group in self.param_groups)
            and all(_is_zero(each.grad) for each in parameters)
        )
        if is_empty and any(recording.pending(weight).records for weight, _ in self._tables if self._records(weight)):
            for each in parameters:
                each.grad = None
            raise RuntimeError(
                "torch.distributed.checkpoint.state_dict makes the state of an optimiser that has none by a step with a learning "
                "rate of 0, and would lose the backward that is recorded: call it before backward, or after step. It leaves lr = "
                "0: set it again before you go on"
            )
        return is_empty

    def _allocate(self):
        """Allocate the state of all tables, as it is before any step."""
        for weight, bias in self._tables:
            self._allocate_counts(weight)
            for parameter in (weight, bias):
                if parameter is not None and parameter.requires_grad:
                    self._allocate_buffers(parameter)

    def _on_all_ranks(self, action):
        """Call action() on all ranks that have rows of these tables; if it raises on one of them, raise that on all."""
        for ranks, device in self._ranks().items():
            action = partial(ranks.together, "the agreement on a step", action, device)
        return action()

    def _ranks(self):
        """{Ranks that hold rows of these tables: device of the table}."""
        return {class_tables.ranks_of(weight): weight.device for weight, _ in self._tables}

    def _check(self):
        """Raise if a step cannot be made, before anything has changed."""
        if getattr(self, "grad_scale", 1) is None:
            raise RuntimeError(
                "GradScaler.unscale_ cannot reach the gradient of a class table, which does not exist yet: don't call it for "
                f"{type(self).__name__}, whose step divides by the scale"
            )
        for group in self.param_groups:  # a scheduler may have changed them
            self.check_options(group)
        for weight, bias in self._tables:
            for parameter in (weight,) if bias is None else (weight, bias):
                validation.check_read("a class table to step", "(C, D)", parameter)
                table_state.check_rows(parameter, self._group_of(parameter), self.state.get(parameter, {}))
            if not self._records(weight):
                raise RuntimeError(
                    "a fused optimiser that was made later for the same class table has its gradient: step that one, or make "
                    "this one again"
                )
            recording.pending(weight).check(weight)
            if not recording.pending(weight).records and class_tables.head_of(weight) is None:
                raise RuntimeError(
                    f"no head has the class table {tuple(weight.shape)} any more: it was deleted, or torch.nn.utils.parametrize "
                    "or prune has given it another parameter, which a fused optimiser does not train: make the optimiser again, "
                    "or train that head with torch.optim"
                )

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of torch.optim.Optimizer. Raises RuntimeError after a step that was interrupted, see `step`."""
        for weight, _ in self._tables:
            table_state.check_whole(self.state.get(weight, {}))
        return super().state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the records of backward."""
        super().zero_grad(set_to_none)
        for weight, _ in self._tables:
            if self._records(weight):
                recording.pending(weight).records.clear()

    def _records(self, weight):
        """True if backward records for this optimiser, and not for one made later."""
        found = recording.pending(weight)
        return found is not None and found.optimizer() is self

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict as torch.optim.Optimizer does, but keep the dtype that state has there.

        Raises:
            ValueError: state of another shape than the table's, or of another rule; an option that is not supported.
        """
        for group in state_dict["param_groups"]:
            if self._OPTION not in group:
                raise ValueError(f"a group has no {self._OPTION}, so its state is another rule's than {type(self).__name__}'s")
            self.check_options({**self.defaults, **group})
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        params = dict(zip(ids, chain.from_iterable(group["params"] for group in self.param_groups), strict=False))
        for key, state in state_dict["state"].items():
            if key not in params:
                raise ValueError(f"state must be of a parameter that param_groups has, {ids}, got one of {key!r}")
            for name in state:
                if name.removesuffix("_scale") not in (*self._STATE, *table_state.COUNTS):
                    raise ValueError(
                        f"{name} is no state of {type(self).__name__}, which has {[*self._STATE]}: another optimiser's"
                    )
                table_state.check_state(state, name, params[key], waits=True)
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:  # torch.optim's own state has fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for key, state in state_dict["state"].items():
            device = params[key].device
            self.state[params[key]] = {
                name: value.to("cpu" if name == "rounding_step" else device).contiguous() for name, value in state.items()
            }

    def _find_tables(self):
        """(weight, bias or None) of each table."""
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        known = {id(parameter) for parameter in params}
        tables = []
        for parameter in params:
            head = class_tables.head_of(parameter)
            if hasattr(parameter, "table_of_columns"):
                raise ValueError(
                    f"{type(self).__name__} trains tables with a row for each class, and the W {tuple(parameter.shape)} of "
                    f"{parameter.table_of_columns} has a column: take MarginSoftmaxLoss(embedding_size, num_classes, "
                    "margin=...), whose weight is W.T; or another optimiser"
                )
            if head is None:
                raise ValueError(
                    f"{type(self).__name__} trains class tables alone, the parameters of CosFaceLoss, MarginSoftmaxLoss and the "
                    f"like, but was given one of shape {tuple(parameter.shape)} that is none, or whose head no longer exists, or "
                    "of which torch.nn.utils.parametrize or prune makes a table, or a head's scale: it needs another optimiser"
                )
            table_state.check_rows(parameter, self._group_of(parameter), {})
            if any(id(other) not in known for other in (head.weight, head.bias) if other is not None):
                raise ValueError("the weight and the bias of a head are one table: give both to the optimiser")
            if parameter is head.weight:
                tables.append((parameter, head.bias))
        return tables

    def _finite(self, factors):
        """0-dim bool, on the device: True if every recorded tensor is finite and GradScaler, if any, found no infinity. The same
        on all ranks.
        """
        device = factors[0].unit.device if factors else None
        found = getattr(self, "found_inf", None)
        flags = [torch.as_tensor(found, device=device) == 0] if found is not None else []
        for f in factors:  # the gradient of x̃·w̃_y is multiplied by x̃
            product = f.product_grad * f.unit.abs().amax(1, keepdim=True)
            tensors = product, f.total, f.lse_grad, f.length_grad, f.sum_grad
            flags += [tensor.isfinite().all() for tensor in tensors if tensor is not None]
        finite = torch.stack(flags).all() if flags else torch.tensor(True, dtype=torch.bool, device="cpu")
        for ranks, device in self._ranks().items():
            finite = ranks.all(finite, device)
        return finite

    def _unscaled(self, record):
        """The record, with its gradients divided by the scale of the GradScaler, if there is one."""
        if not hasattr(self, "grad_scale"):
            return record
        factors = record.factors
        gradients = {name: getattr(factors, name) for name in ("lse_grad", "product_grad", "length_grad", "sum_grad")}
        scaled = {name: grad / self.grad_scale for name, grad in gradients.items() if grad is not None}
        return record._replace(factors=factors._replace(**scaled))

    def _step_table(self, weight, bias, records, finite):
        self._allocate_counts(weight)
        state = self.state[weight]
        state["skipped"] += ~finite
        state["rounding_step"] += 1
        known = weight.device.type == "cpu"  # elsewhere asking would wait for the device
        if known and not finite:
            return
        skip = None if known else ~finite
        rounding_step = int(state["rounding_step"])
        # A record counts even if its parameter is frozen now, as a .grad would; all records agree (Pending.check).
        trained = records[0].trained if records else [each is not None and each.requires_grad for each in (weight, bias)]
        parameters = [parameter if needed else None for parameter, needed in zip((weight, bias), trained, strict=True)]
        parts = [None if parameter is None else self._part(parameter, rounding_step, skip) for parameter in parameters]
        if not records:
            return
        rows = dtensors.local(weight.detach()), None if bias is None else dtensors.local(bias.detach())
        table = Table(*rows, index=recorded_gradient.rows_of(records), row_scale=class_tables.row_scale(weight))
        changed = [parameter for parameter in parameters if parameter is not None]
        torch.autograd.graph.increment_version(changed)  # native code does not do it
        recorded_gradient.write_gradient(table, records, rules.Update(table, *parts))

    def _allocate_counts(self, weight):
        for name, device in (("skipped", weight.device), ("rounding_step", "cpu")):
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros((), dtype=torch.int64, device=device)

    def _allocate_buffers(self, parameter):
        group, state = self._group_of(parameter), self.state[parameter]
        for name in self._names(group):
            if name not in state:
                table_state.allocate(parameter, state, name, group["state_format"])
        if self._COUNTS_STEPS and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def _part(self, parameter, rounding_step, skip):
        self._allocate_buffers(parameter)
        group, state = self._group_of(parameter), self.state[parameter]
        buffers = []
        for name in self._names(group):
            scale = state.get(f"{name}_scale")
            buffers.append((table_state.rows_of(state[name]), None if scale is None else dtensors.local(scale)))
        longest = group["max_row_norm"]
        longest = None if longest is None else max(float(longest), 2.0**-126)  # as a float32 it is not 0
        return rules.Part(
            rows=table_state.rows_of(parameter.detach()),
            states=buffers,
            rule=self._rule(group, parameter, skip),
            key=formats.rounding_key(group["seed"], rounding_step),
            first_row=dtensors.first_row(parameter),
            skip=skip,
            max_row_norm=longest,
            row_scale=class_tables.row_scale(parameter),
        )

    def _names(self, group):
        """Names of the state that a group's parameters need."""
        return self._STATE

    def _group_of(self, parameter):
        return next(group for group in self.param_groups if any(parameter is other for other in group["params"]))


def _is_zero(grad):
    return grad is not None and not dtensors.local(grad).any()


def number(name, value):
    """A hyperparameter, which may be a tensor, as a number."""
    if not isinstance(value, torch.Tensor):
        return value
    validation.check_read(name, "()", value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one, got {validation.shown(value)}")
    return value.item()
