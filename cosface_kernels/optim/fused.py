"""Optimisers of class tables whose `step` makes the gradient itself, slab by slab: no C x D gradient ever exists.

    head = CosFaceLoss(512, 10_000_000, table_format="bfloat16")
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format="int8")
    head(features, labels).backward()     # head.weight.grad stays None
    optimizer.step()                      # gradient and update together, while a slab is in the cache
    optimizer.zero_grad()

The backbone has an optimiser of its own, as ever.
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
_INTERRUPTED = "interrupted"  # in the state of a table while it is between steps; state that is loaded has none


class _Fused(torch.optim.Optimizer):
    """What both have in common. A subclass has its rule, and names its state."""

    _STATE = ()  # names of what it may hold for each number of a table
    _OPTION = None  # one that its rule has and others do not
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
        """Raises for options of a group, whether given here or loaded, that cannot be."""
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
        """How many steps changed nothing, because a loss or a gradient was not finite."""
        return max((int(self.state[weight].get("skipped", 0)) for weight, _ in self._tables), default=0)

    @torch.no_grad()
    def step(self, closure=None):
        """One step with what backward has recorded since the last one, which is then forgotten.

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
        """action(), made by none where one of the ranks that have rows of these tables cannot."""
        for ranks, device in self._ranks().items():
            action = partial(ranks.together, "the agreement on a step", action, device)
        return action()

    def _ranks(self):
        """{Ranks: device} that have rows of these tables."""
        return {recording.ranks_of(weight): weight.device for weight, _ in self._tables}

    def _check(self):
        """Raises where a step cannot be made, before anything has changed."""
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
        """As torch.optim's. Raises RuntimeError after a step that was interrupted, see `step`."""
        for weight, _ in self._tables:
            _check_whole(self.state.get(weight, {}))
        return super().state_dict()

    def zero_grad(self, set_to_none=True):
        """Forgets what backward has recorded."""
        super().zero_grad(set_to_none)
        for weight, _ in self._tables:
            if self._records(weight):
                recording.pending(weight).records.clear()

    def _records(self, weight):
        """Whether backward records for this optimiser, and not for one made later."""
        found = recording.pending(weight)
        return found is not None and found.optimizer() is self

    def load_state_dict(self, state_dict):
        """As torch.optim's, but state keeps the dtype that it has there.

        Raises:
            ValueError: state of another shape than the table's, or of another kind of optimiser; an option that there is not.
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
        """Whether everything that was recorded is finite and no scaler found anything else: bool (0-dim), on the device."""
        device = factors[0].unit.device if factors else None
        found = getattr(self, "found_inf", None)
        flags = [torch.as_tensor(found, device=device) == 0] if found is not None else []
        for f in factors:  # the product with x̃ of what came back for x̃·w̃_y is a part of the gradient
            product = f.product_grad * f.unit.abs().amax(1, keepdim=True)
            flags += [tensor.isfinite().all() for tensor in (product, f.total, f.lse_grad, f.length_grad)]
        finite = torch.stack(flags).all() if flags else torch.tensor(True, dtype=torch.bool, device="cpu")
        for ranks, device in self._ranks().items():
            finite = ranks.all(finite, device)
        return finite

    def _unscaled(self, record):
        """A record, with gradients divided by the scale of a GradScaler that is at work."""
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
        # As a .grad does, what was recorded counts though its parameter is frozen since; all records agree (Pending.check).
        trained = records[0].trained if records else [each is not None and each.requires_grad for each in (weight, bias)]
        parameters = [parameter if needed else None for parameter, needed in zip((weight, bias), trained, strict=True)]
        parts = [None if parameter is None else self._part(parameter, rounding_step, skip) for parameter in parameters]
        if not records:
            return
        rows = dtensors.local(weight.detach()), None if bias is None else dtensors.local(bias.detach())
        table = Table(*rows, index=recording.rows_of(records))
        changed = [parameter for parameter in parameters if parameter is not None]
        torch.autograd.graph.increment_version(changed)  # native code does not
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
        """Of the state that a group's parameters need."""
        return self._STATE

    def _group_of(self, parameter):
        return next(group for group in self.param_groups if any(parameter is other for other in group["params"]))

    def _allocate(self, parameter, state, name, state_format):
        """Zeros: what a first step would begin with."""
        dtype = formats.STATE_FORMATS[state_format if parameter.dim() == 2 else "float32"]
        if dtype == torch.float32:
            dtype = torch.promote_types(parameter.dtype, dtype)
        if dtype == torch.int8 and name == "exp_avg_sq":
            dtype = torch.uint8
        state[name] = dtensors.zeros(parameter, parameter.shape, dtype)
        if dtype in formats.LARGEST_CODE:
            state[f"{name}_scale"] = dtensors.zeros(parameter, parameter.shape[:1], torch.float32)


def _number(value):
    """A hyperparameter that may be a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _rows(tensor):
    """(R, D), (R, 1) of a bias, as this rank holds them."""
    tensor = dtensors.local(tensor)
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _check_rows(parameter, group, state):
    """A parameter that `step` can write, which also `head.to(...)` and `weight.data = ...` may have made another."""
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
    """State of a table that is not between steps."""
    if _INTERRUPTED in state:
        raise RuntimeError(
            "the class table is between steps: an error or Ctrl-C ended the last step when some of its rows had been updated and "
            "others not. Load table and optimiser from a checkpoint, or make the optimiser again to go on from the table as it is"
        )


def _check_state(name, value, parameter):
    """State that is no number has its parameter's shape, a scale a number for each row, and is sharded as the parameter is."""
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

    What `backward` records is O(N D), and added up over several of them. A loss or gradient that is not finite makes `step` leave
    everything as it was and count that in `skipped_steps`; on a GPU that is decided there. `clip_grad_norm_` cannot see the
    table. GradScaler works without `unscale_` for this optimiser; its `update` wants at least one optimiser with ordinary
    gradients.

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
        # torch.optim.SGD's, so that it can go on with a state_dict of this one.
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

    All else, and what is raised: as FusedSGD.

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
        """Of the step that is made with it: asking counts it."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["step"] += 1 if skip is None else ~skip
        betas = tuple(map(float, group["betas"]))
        return rules.AdamW(
            float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"]), group["maximize"], state["step"]
        )
