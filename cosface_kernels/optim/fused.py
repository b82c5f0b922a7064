"""Optimisers of class tables whose `step` makes the gradient itself, slab by slab: no C x D gradient ever exists.

    head = CosFaceLoss(512, 10_000_000, table_format="bfloat16")
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format="int8")
    head(features, labels).backward()     # head.weight.grad stays None
    optimizer.step()                      # gradient and update together, while a slab is in the cache
    optimizer.zero_grad()

The backbone has an ordinary optimiser of its own.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import validation
from ..validation import StateFormat
from . import rules
from .base import Fused, number


class FusedSGD(Fused):
    """torch.optim.SGD for class tables, without their gradient.

        g = ∇ + λ w,     m = μ m + g,     w = w - η m, or with nesterov η (g + μ m)

    Args:
        params: the parameters of heads (CosFaceLoss, MarginSoftmaxLoss), or groups of them.
        lr, momentum, weight_decay, nesterov, maximize: η, μ, λ and the rest as in torch.optim.SGD.
        max_row_norm: the gradient of each row, ∇_j (D,), is made that long where it is longer, before anything else:
            ∇_j · min(1, max_row_norm / ‖∇_j‖); a bias is a row of one number. None: as it is. `clip_grad_norm_` cannot clip the
            table, which has no gradient when it is called.
        state_format: of the momentum: "float32" (4 D bytes for each row of the table), "bfloat16" (2 D) or "int8" (D + 4: codes
            and a scale for each row).
        seed: of the stochastic rounding of tables and state that are not float32.

    Each `backward` records O(N D) numbers, and `step` uses the sum of their gradients. If a loss or gradient is not finite,
    `step` changes nothing and adds one to `skipped_steps`; on a GPU the host does not wait for that. GradScaler
    works without `unscale_` for this optimiser; its `update` needs at least one optimiser with ordinary gradients.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or value; a parameter that is not a class table.

    Source: torch.optim.SGD.
    """

    _STATE, _OPTION = ("momentum_buffer",), "momentum"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        max_row_norm: float | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
    ) -> None:
        # The defaults of torch.optim.SGD, which can then load a state_dict of this one.
        defaults = {"lr": lr, "momentum": momentum, "dampening": 0, "weight_decay": weight_decay, "nesterov": nesterov}
        own = {"max_row_norm": max_row_norm, "state_format": state_format, "seed": seed}
        super().__init__(params, {**defaults, "maximize": maximize, **own})

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        validation.check_at_least_zero("momentum", number("momentum", options["momentum"]))
        if options["nesterov"] and not options["momentum"]:
            raise ValueError("nesterov needs a momentum, got momentum = 0")
        if options["dampening"]:
            raise ValueError(f"FusedSGD has no dampening, which must be 0, got {options['dampening']}")

    def _names(self, group):
        return self._STATE if group["momentum"] else ()

    def _rule(self, group, parameter, skip):
        numbers = (float(group[name]) for name in ("lr", "momentum", "weight_decay"))
        return rules.SGD(*numbers, group["nesterov"], group["maximize"])


class FusedAdamW(Fused):
    """torch.optim.AdamW for class tables, without their gradient.

        m = β1 m + (1 - β1) ∇,  v = β2 v + (1 - β2) ∇²,  w = w - η λ w - η (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε)

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW, for heads.
        max_row_norm, state_format, seed: as in FusedSGD, the format for both m and v: twice its bytes. In "int8" v is stored as
            its square root, and never becomes 0.

    The rest, and the errors, as for FusedSGD.

    Source: torch.optim.AdamW; Loshchilov and Hutter, arXiv 1711.05101.
    """

    _STATE, _OPTION, _COUNTS_STEPS = ("exp_avg", "exp_avg_sq"), "betas", True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_row_norm: float | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": False, "maximize": maximize}
        super().__init__(params, {**defaults, "max_row_norm": max_row_norm, "state_format": state_format, "seed": seed})

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        validation.check_at_least_zero("eps", number("eps", options["eps"]))
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {validation.shown(betas)}")
        for index, given in enumerate(betas):
            beta = number(f"betas[{index}]", given)
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
        state["step"] += 1 if skip is None else ~skip
        betas = tuple(map(float, group["betas"]))
        return rules.AdamW(
            float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"]), group["maximize"], state["step"]
        )
