"""Optimisers of class tables whose `step` makes the gradient itself, slab by slab: no C x D gradient ever exists.

    head = CosFaceLoss(512, 10_000_000, table_format="bfloat16")
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format="int8")
    head(features, labels).backward()     # head.weight.grad stays None
    optimizer.step()                      # gradient and update together, while a slab is in the cache
    optimizer.zero_grad()

The backbone has an ordinary optimiser of its own.
"""

from functools import partial
from itertools import chain

import torch

from .. import validation
from ..distributed import dtensors
from ..ops import formats, recording
from ..ops.table import Table
from . import rules

_COUNTS = ("step", "skipped", "rounding_step")
_INTERRUPTED = "interrupted"  # key in a table's state while a step is writing it; never in state that is loaded


class _Fused(torch.optim.Optimizer):
    """Base class of the fused optimisers. A subclass defines its rule and the names of its state."""

    _STATE = ()  # names of its buffers of the table's shape
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

    def add_param_group(self, param_group):
        self.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._attach()
            except ValueError:
                self.param_groups.pop()
                raise

    def check_options(self, options):
        """Raise for options of a group, given here or loaded, of the wrong type or value."""
        for name in ("lr", "weight_decay"):
            validation.check_at_least_zero(name, _number(options[name]))
        validation.check_choice("state_format", options["state_format"], formats.STATE_FORMATS)
        validation.check_integer("seed", options["seed"])

    def _attach(self):
        self._tables = self._find_tables()
        for weight, bias in self._tables:
            recording.attach(weight, bias, self)

    @property
    def skipped_steps(self):
        """The number of steps that changed nothing, because a loss or a gradient was not finite."""
        return max((int(self.state[weight].get("skipped", 0)) for weight, _ in self._tables), default=0)

    @torch.no_grad()
    def step(self, closure=None):
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
        self._on_all_ranks(self._check)
        finite = self._finite([record.factors for weight, _ in self._tables for record in recording.pending(weight).records])
        for weight, bias in self._tables:
            records = recording.pending(weight).take()
            if records or not len(dtensors.local(weight)):  # a rank without rows counts and keeps state as the others do
                self.state[weight][_INTERRUPTED] = True  # until the last slab is written
                self._step_table(weight, bias, [self._unscaled(record) for record in records], finite)
                del self.state[weight][_INTERRUPTED]
        return loss

    def _on_all_ranks(self, action):
        """Call action() on all ranks that have rows of these tables; if it raises on one of them, raise that on all."""
        for ranks, device in self._ranks().items():
            action = partial(ranks.together, "the agreement on a step", action, device)
        return action()

    def _ranks(self):
        """{Ranks that hold rows of these tables: device of the table}."""
        return {recording.ranks_of(weight): weight.device for weight, _ in self._tables}

    def _check(self):
        """Raise if a step cannot be made, before anything has changed."""
        if getattr(self, "grad_scale", 1) is None:
            raise RuntimeError(
                "GradScaler.unscale_ cannot reach the gradient of a class table, which does not exist yet: don't call it for "
                f"{type(self).__name__}, whose step divides by the scale"
            )
        for weight, bias in self._tables:
            for parameter in (weight,) if bias is None else (weight, bias):
                _check_rows(parameter, self._group_of(parameter), self.state.get(parameter, {}))
            if not self._records(weight):
                raise RuntimeError(
                    "a fused optimiser that was made later for the same class table has its gradient: step that one, or make "
                    "this one again"
                )
            recording.pending(weight).check(weight)

    def state_dict(self):
        """As in torch.optim.Optimizer. Raises RuntimeError after a step that was interrupted, see `step`."""
        for weight, _ in self._tables:
            _check_whole(self.state.get(weight, {}))
        return super().state_dict()

    def zero_grad(self, set_to_none=True):
        """Forget the records of backward."""
        super().zero_grad(set_to_none)
        for weight, _ in self._tables:
            if self._records(weight):
                recording.pending(weight).records.clear()

    def _records(self, weight):
        """True if backward records for this optimiser, and not for one made later."""
        found = recording.pending(weight)
        return found is not None and found.optimizer() is self

    def load_state_dict(self, state_dict):
        """As in torch.optim.Optimizer, but state keeps the dtype that it has in the state_dict.

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
            for name, value in state.items():
                if name.removesuffix("_scale") not in (*self._STATE, *_COUNTS):
                    raise ValueError(
                        f"{name} is no state of {type(self).__name__}, which has {[*self._STATE]}: another optimiser's"
                    )
                _check_state(name, value, params.get(key))
                if value.dtype in formats.LARGEST_CODE and f"{name}_scale" not in state:
                    raise ValueError(f"{name} is {value.dtype}, so there must be a {name}_scale")
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
            head = recording.head_of(parameter)
            if head is None:
                raise ValueError(
                    f"{type(self).__name__} trains class tables alone, the parameters of CosFaceLoss, MarginSoftmaxLoss and the "
                    f"like, but was given one of shape {tuple(parameter.shape)} that is none, or whose head no longer exists: it "
                    "needs another optimiser"
                )
            _check_rows(parameter, self._group_of(parameter), {})
            if any(id(other) not in known for other in head.parameters()):
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
            flags += [tensor.isfinite().all() for tensor in (product, f.total, f.lse_grad, f.length_grad)]
        finite = torch.stack(flags).all() if flags else torch.tensor(True, dtype=torch.bool, device="cpu")
        for ranks, device in self._ranks().items():
            finite = ranks.all(finite, device)
        return finite

    def _unscaled(self, record):
        """The record, with its gradients divided by the scale of the GradScaler, if there is one."""
        if not hasattr(self, "grad_scale"):
            return record
        factors = record.factors
        scaled = {name: getattr(factors, name) / self.grad_scale for name in ("lse_grad", "product_grad", "length_grad")}
        return record._replace(factors=factors._replace(**scaled))

    def _step_table(self, weight, bias, records, finite):
        state = self.state[weight]
        if "skipped" not in state:
            state["skipped"] = torch.zeros((), dtype=torch.int64, device=weight.device)
            state["rounding_step"] = torch.zeros((), dtype=torch.int64, device="cpu")
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
        table = Table(*rows, index=recording.rows_of(records))
        changed = [parameter for parameter in parameters if parameter is not None]
        torch.autograd.graph.increment_version(changed)  # native code does not do it
        recording.write_gradient(table, records, rules.Update(table, *parts))

    def _part(self, parameter, rounding_step, skip):
        group, state = self._group_of(parameter), self.state[parameter]
        buffers = []
        for name in self._names(group):
            if name not in state:
                self._allocate(parameter, state, name, group["state_format"])
            scale = state.get(f"{name}_scale")
            buffers.append((_rows(state[name]), None if scale is None else dtensors.local(scale)))
        key = formats.rounding_key(group["seed"], rounding_step)
        first_row = dtensors.first_row(parameter)
        return rules.Part(_rows(parameter.detach()), buffers, self._rule(group, parameter, skip), key, first_row, skip)

    def _names(self, group):
        """Names of the state that a group's parameters need."""
        return self._STATE

    def _group_of(self, parameter):
        return next(group for group in self.param_groups if any(parameter is other for other in group["params"]))

    def _allocate(self, parameter, state, name, state_format):
        """Add a buffer of zeros, the first value of all state, in its format."""
        dtype = formats.STATE_FORMATS[state_format if parameter.dim() == 2 else "float32"]
        if dtype == torch.float32:
            dtype = torch.promote_types(parameter.dtype, dtype)
        if dtype == torch.int8 and name == "exp_avg_sq":
            dtype = torch.uint8
        state[name] = dtensors.zeros(parameter, parameter.shape, dtype)
        if dtype in formats.LARGEST_CODE:
            state[f"{name}_scale"] = dtensors.zeros(parameter, parameter.shape[:1], torch.float32)


def _number(value):
    """A hyperparameter, which may be a tensor, as a number."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _rows(tensor):
    """This rank's rows (R, D) of a table or its state; (R, 1) for a bias."""
    tensor = dtensors.local(tensor)
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _check_rows(parameter, group, state):
    """Check that `step` can write a parameter and its state: `head.to(...)` and `weight.data = ...` may have replaced them."""
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"a class table to train must be float32, bfloat16 or float64, got {parameter.dtype}")
    if not dtensors.local(parameter).is_contiguous():
        raise ValueError(f"a class table to train must be contiguous, got strides {parameter.stride()}")
    if parameter.dtype == torch.float64 and group["state_format"] != "float32":
        raise ValueError(f'a float64 table has state of its own dtype, state_format="float32", got {group["state_format"]!r}')
    _check_whole(state)
    wide = torch.promote_types(parameter.dtype, torch.float32)
    for name, value in state.items():
        try:
            _check_state(name, value, parameter)
            if value.dim() and (value.device != parameter.device or not dtensors.local(value).is_contiguous()):
                raise ValueError(
                    f"{name} must be contiguous on {parameter.device}, got strides {value.stride()} on {value.device}"
                )
            if value.dtype in formats.LARGEST_CODE and f"{name}_scale" not in state:
                raise ValueError(f"{name} is {value.dtype}, so there must be a {name}_scale")
        except (TypeError, ValueError) as error:
            message = (
                f"{error}: the table or its state was replaced; make the optimiser again (head.grow and head.remove keep both)"
            )
            raise type(error)(message) from None
        is_wide = value.dim() and value.is_floating_point() and not formats.is_rounded(value.dtype)
        if is_wide and not name.endswith("_scale") and value.dtype != wide:
            raise ValueError(f"{name} is {value.dtype}, but the table is {parameter.dtype} now: make the optimiser again")


def _check_whole(state):
    """Raise for the state of a table whose last step was interrupted."""
    if _INTERRUPTED in state:
        raise RuntimeError(
            "the class table is between steps: an error or Ctrl-C ended the last step when some of its rows had been updated and "
            "others not. Load table and optimiser from a checkpoint, or make the optimiser again to go on from the table as it is"
        )


def _check_state(name, value, parameter):
    """Check a buffer: it has its parameter's shape (a scale: one number for each row), and is sharded as the parameter is."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r}")
    if parameter is None or not value.dim():
        return
    shape = parameter.shape[:1] if name.endswith("_scale") else parameter.shape
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for the table of {tuple(parameter.shape)}, got {tuple(value.shape)}"
        )
    dtypes = (
        (torch.float32,) if name.endswith("_scale") else (torch.float32, torch.float64, torch.bfloat16, *formats.LARGEST_CODE)
    )
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {dtypes}, got {value.dtype}")
    if dtensors.is_sharded(value) != dtensors.is_sharded(parameter):
        raise ValueError(f"{name} must be sharded where the table is: use load_checkpoint, which shards what was plain")


class FusedSGD(_Fused):
    """torch.optim.SGD for class tables, without their gradient.

        g = ∇ + λ w,     m = μ m + g,     w = w - η m, or with nesterov η (g + μ m)

    Args:
        params: the parameters of heads (CosFaceLoss, MarginSoftmaxLoss), or groups of them.
        lr, momentum, weight_decay, nesterov, maximize: η, μ, λ and the rest as in torch.optim.SGD.
        state_format: of the momentum: "float32" (4 D bytes for each row of the table), "bfloat16" (2 D) or "int8" (D + 4: codes
            and a scale for each row).
        seed: of the stochastic rounding of tables and state that are not float32.

    Each `backward` records O(N D) numbers, and `step` uses the sum of their gradients. If a loss or gradient is not finite,
    `step` changes nothing and adds one to `skipped_steps`; on a GPU the host does not wait for that. `clip_grad_norm_` cannot
    clip the table. GradScaler works without `unscale_` for this optimiser; its `update` needs at least one optimiser with
    ordinary gradients.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or value; a parameter that is not a class table.

    Source: torch.optim.SGD.
    """

    _STATE, _OPTION = ("momentum_buffer",), "momentum"

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        *,
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
        state_format="float32",
        seed=0,
    ):
        # The defaults of torch.optim.SGD, which can then load a state_dict of this one.
        defaults = {"lr": lr, "momentum": momentum, "dampening": 0, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, "maximize": maximize, "state_format": state_format, "seed": seed})

    def check_options(self, options):
        super().check_options(options)
        validation.check_at_least_zero("momentum", _number(options["momentum"]))
        if options["nesterov"] and not options["momentum"]:
            raise ValueError("nesterov needs a momentum, got momentum = 0")
        if options["dampening"]:
            raise ValueError(f"FusedSGD has no dampening, which must be 0, got {options['dampening']}")

    def _names(self, group):
        return self._STATE if group["momentum"] else ()

    def _rule(self, group, parameter, skip):
        numbers = (float(group[name]) for name in ("lr", "momentum", "weight_decay"))
        return rules.SGD(*numbers, group["nesterov"], group["maximize"])


class FusedAdamW(_Fused):
    """torch.optim.AdamW for class tables, without their gradient.

        m = β1 m + (1 - β1) ∇,  v = β2 v + (1 - β2) ∇²,  w = w - η λ w - η (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε)

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW, for heads.
        state_format, seed: as in FusedSGD, for both m and v: twice its bytes. In "int8" v is stored as its square root, and
            never becomes 0.

    The rest, and the errors, as for FusedSGD.

    Source: torch.optim.AdamW; Loshchilov and Hutter, arXiv 1711.05101.
    """

    _STATE, _OPTION = ("exp_avg", "exp_avg_sq"), "betas"

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        maximize=False,
        state_format="float32",
        seed=0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False, "maximize": maximize}
        super().__init__(params, {**defaults, "state_format": state_format, "seed": seed})

    def check_options(self, options):
        super().check_options(options)
        validation.check_at_least_zero("eps", _number(options["eps"]))
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {validation.shown(betas)}")
        for index, beta in enumerate(map(_number, betas)):
            validation.check_number(f"betas[{index}]", beta)
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}] must be in [0, 1), got {beta}")
        if not options.get("decoupled_weight_decay", True):
            raise ValueError(
                "FusedAdamW decays weights by themselves, as AdamW does; torch.optim.Adam adds the decay to the gradient"
            )
        if options["amsgrad"]:
            raise ValueError("FusedAdamW has no amsgrad, which must be False")

    def _rule(self, group, parameter, skip):
        """The AdamW rule of the current step. Increments the step counter, so call it once per step."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["step"] += 1 if skip is None else ~skip
        betas = tuple(map(float, group["betas"]))
        return rules.AdamW(
            float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"]), group["maximize"], state["step"]
        )
