"""InsightFace's margin objects (recognition/arcface_torch/losses.py) as margins of this package, and its PartialFC_V2.

    head = insightface.head(CombinedMarginLoss(64, 1.0, 0.5, 0.0), embedding_size=512, num_classes=1_000_000)
    loss = head(embeddings, labels)                      # instead of PartialFC and the margin object, in one process

    from cosface_kernels.compat.insightface import PartialFC_V2      # instead of partial_fc_v2's, on every rank

An object is measured, not trusted: see `translate`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..heads import MarginSoftmaxLoss
from .insightface_margins import translate

if TYPE_CHECKING:
    from .partial_fc import PartialFC_V2

__all__ = ["PartialFC_V2", "head", "split_optimizer_state", "translate"]


def head(
    margin_loss: Callable[..., Tensor], embedding_size: int, num_classes: int, *, ignore_index: int = -1, **options: Any
) -> MarginSoftmaxLoss:
    """A MarginSoftmaxLoss with the margin and scale of `margin_loss`, and InsightFace's convention that label -1 is no class.

    Differences from their PartialFC with that object, in one process and without sampling:

    - Rows labelled -1 add nothing: no loss, no gradient, not counted in the mean. Theirs adds 69.08 to the mean's sum for each,
      and pushes its embedding away from every class.
    - A row's loss may exceed 69.08 = -ln 1e-30, where theirs is capped (and its gradient is not).
    - Past θ + m = π ArcFace goes on falling, as cos θ - m sin m, where releases without a threshold rise again.
    - labels have shape (N,), and batches may differ in size.

    Args:
        margin_loss: their CosFace, ArcFace or CombinedMarginLoss, as for `translate`.
        embedding_size, num_classes, **options: of MarginSoftmaxLoss.

    Raises:
        TypeError, ValueError: from `translate`, or from MarginSoftmaxLoss.
    """
    margin, scale = translate(margin_loss)
    return MarginSoftmaxLoss(embedding_size, num_classes, margin=margin, scale=scale, ignore_index=ignore_index, **options)


def split_optimizer_state(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The state_dict of one optimiser as one for each of its parameter groups, for optimisers with a group each.

        state = torch.load("checkpoint_gpu_0.pt")["state_optimizer"]         # torch.optim.SGD over backbone and PartialFC_V2
        for optimizer, part in zip((sgd, fused_sgd), split_optimizer_state(state), strict=True):
            optimizer.load_state_dict(part)

    Tensors are shared, not copied. A tensor for each row of the table is as the rank has it.

    Raises:
        TypeError, ValueError: no state_dict of a torch.optim.Optimizer, or one that lacks a part.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be that of a torch.optim.Optimizer, got {type(state_dict).__name__}")
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(f"state_dict must be that of a torch.optim.Optimizer, got one without {sorted(missing)}")
    parts = []
    for group in state_dict["param_groups"]:
        numbers = {old: new for new, old in enumerate(group["params"])}
        state = {numbers[old]: value for old, value in state_dict["state"].items() if old in numbers}
        parts.append({**state_dict, "state": state, "param_groups": [{**group, "params": [*numbers.values()]}]})
    return parts


def __getattr__(name):
    """Import PartialFC_V2 on first use: torch.distributed.tensor takes half a second to import, and not every PyTorch has it."""
    if name == "PartialFC_V2":
        from .partial_fc import PartialFC_V2

        return PartialFC_V2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
