"""The margin softmax losses of pytorch-metric-learning, computed without an N x C matrix: change the import, keep the rest.

Each class is a subclass of theirs with the same constructor: reducers, regularizers, miners (`indices_tuple`), `collect_stats`,
`get_logits` and the state dict (`W`, (D, C)) are theirs. Each row's loss is computed in another way, and where theirs goes wrong
ours differs:

- W keeps its dtype. Theirs turns it into that of the first embeddings, for good: after one bfloat16 batch, as autocast on a CPU
  gives it, an optimiser trains a bfloat16 table. `get_logits` takes embeddings of another dtype than W.
- The loss of 16-bit embeddings is float32, and so are miner weights: theirs counts in 16 bits, where 65,520 pairs of one row are
  infinite. (With a regularizer their sum of the two is in the dtype of the embeddings.) Logits are float32 at least.
- Labels may have any integer dtype. One outside [0, C), also -1, is an IndexError on a CPU and a NaN loss on a GPU. A row
  labelled -100 is left out: no loss, no gradient, not counted by the reducer, where theirs counts it, or raises if C < 100.
- A target cosine of exactly 1 or -1 has a finite gradient under ArcFace, where theirs is NaN; an embedding of zeros has gradient
  0, where theirs is of the order of 1e12; an empty batch has loss 0, where theirs is NaN.
- `distance` must give cosines: a ValueError for CosineSimilarity with `p` or `power`, which theirs takes, and for a
  NormalizedSoftmaxLoss with any distance but DotProductSimilarity and CosineSimilarity.
- `collect_stats` records avg_angle, but not the norms that `distance` would record.
- A subclass with its own `modify_cosine_of_target_classes`, `get_target_mask` or `scale_logits` is a TypeError: the
  loss would not call it.

Second derivatives raise, as everywhere in this package.
"""

import math

import torch

from .. import margins
from ..functional import margin_softmax_loss
from ..heads import own_centers
from ..ops.normalize import unit_rows
from ..ops.slabs import wide_dtype

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
except ImportError as error:
    raise ImportError(
        "cosface_kernels.compat.pytorch_metric_learning needs pytorch-metric-learning: pip install pytorch-metric-learning"
    ) from error

__all__ = ["ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SubCenterArcFaceLoss"]

# The label that their torch.nn.CrossEntropyLoss ignores.
IGNORE_INDEX = -100


class _RowLosses:
    """Overrides that the four classes share. `_head()` returns the arguments of margin_softmax_loss."""

    sub_centers = 1

    def __init__(self, *args, **kwargs):
        for name in ("modify_cosine_of_target_classes", "get_target_mask", "scale_logits"):
            owner = next((kind for kind in type(self).__mro__ if name in vars(kind)), type(self))
            if not owner.__module__.startswith(("pytorch_metric_learning.", __name__)) and hasattr(owner, name):
                raise TypeError(
                    f"{owner.__name__}.{name} would not be called: the loss is made without an N x C matrix; write the margin "
                    "as one of cosface_kernels.margins for MarginSoftmaxLoss, or subclass pytorch_metric_learning.losses"
                )
        super().__init__(*args, **kwargs)
        self.W.table_of_columns = type(self).__name__  # a fused optimiser names it in its error
        distance = self.distance
        if type(distance) not in (CosineSimilarity, DotProductSimilarity) or (distance.p, distance.power) != (2, 1):
            raise ValueError(
                f"{type(self).__name__} computes cosines: distance must be CosineSimilarity or DotProductSimilarity with p=2 and "
                f"power=1, got {type(distance).__name__} with p={distance.p} and power={distance.power}"
            )

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        row_losses = margin_softmax_loss(
            embeddings,
            self.W.t(),
            labels,
            centers_per_class=self.sub_centers,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            **self._head(),
        )
        row_losses = row_losses * loss_and_miner_utils.convert_to_weights(indices_tuple, labels, dtype=row_losses.dtype)
        counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if self.collect_stats and hasattr(self, "get_angles"):
            with torch.no_grad():
                self.get_angles(self._own_cosines(embeddings[counted], labels[counted]).amax(1))
        if len(counted) == 0:  # a mean over none would be NaN; these are all 0
            counted = common_functions.torch_arange_from_size(embeddings)
        loss = {"losses": row_losses[counted], "indices": counted, "reduction_type": "element"}
        loss_dict = {"loss": loss if len(counted) else self.zero_loss()}
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def cast_types(self, dtype, device):
        """Move W to the device of the embeddings, as theirs does, but keep its dtype."""
        self.W.data = self.W.data.to(device)

    def get_cosine(self, embeddings):
        """cos_nj, (N, C), materialised; with sub-centres the largest of each class."""
        wide = wide_dtype(embeddings.dtype, self.W.dtype)
        features, table = embeddings.to(wide), unit_rows(self.W.t().to(wide))[0]
        if self.distance.normalize_embeddings:
            features, _ = unit_rows(features)
        with torch.autocast(features.device.type, enabled=False):
            cosine = features @ table.T
        return cosine.view(len(cosine), len(table) // self.sub_centers, self.sub_centers).amax(2)

    def _own_cosines(self, embeddings, labels):
        """The cosines of each row with the centres of its own class, (N, K)."""
        return own_centers.of_rows(embeddings, self.W.t().unflatten(0, (-1, self.sub_centers)), labels.long())


class CosFaceLoss(_RowLosses, losses.CosFaceLoss):
    """Large Margin Cosine Loss, ψ(cos θ) = cos θ - margin. See this module's docstring for what differs from theirs.

    Args:
        num_classes, embedding_size, margin=0.35, scale=64, **kwargs: theirs.

    Source: CosFace, arXiv 1801.09414, eq. 4.
    """

    def _head(self):
        return {"margin": margins.CosFace(self.margin), "scale": self.scale}


class ArcFaceLoss(_RowLosses, losses.ArcFaceLoss):
    """Additive angular margin, ψ(cos θ) = cos(θ + margin), continued as cos θ - margin sin(margin) past θ + margin = π.

    Args:
        num_classes, embedding_size, margin=28.6, scale=64, **kwargs: theirs; margin in degrees (the attribute is in radians).

    Raises:
        ValueError: in forward, a margin outside 0 to 180 degrees, where theirs computes something.

    Source: ArcFace, arXiv 1801.07698, eq. 3.
    """

    def _head(self):
        return {"margin": margins.ArcFace(self.margin), "scale": self.scale}


class SubCenterArcFaceLoss(ArcFaceLoss, losses.SubCenterArcFaceLoss):
    """ArcFace where a class has several centres and a cosine is that of the nearest, cos_nj = max_k x̂_n·ŵ_jk. W is (D, C K).

    `get_outliers` looks at each row's own centres only, in one pass; `return_dominant_centers=False` returns the outliers alone,
    as its name says (theirs returns both); outliers are int64 even if there are none; the dominant centre of a class without rows
    is zero (theirs is memory that nobody wrote). num_classes and embedding_size may be given by position.

    Args:
        num_classes, embedding_size, margin=28.6, scale=64, sub_centers=3, **kwargs: theirs; margin in degrees.

    Source: Sub-center ArcFace, Deng et al., ECCV 2020.
    """

    def __init__(self, num_classes, embedding_size, **kwargs):
        super().__init__(num_classes=num_classes, embedding_size=embedding_size, **kwargs)

    @torch.no_grad()
    def get_outliers(self, embeddings, labels, threshold=75, return_dominant_centers=True):
        """Rows more than `threshold` degrees from their class's dominant centre, the one that is nearest to most of its rows.

        Returns:
            (outliers (R,) int64, by class and then by row; dominant centres (D, C)), or outliers alone.
        """
        common_functions.check_shapes(embeddings, labels)
        self.cast_types(embeddings.dtype, embeddings.device)
        labels = labels.to(embeddings.device).long()
        rows = ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1)
        rows = rows[labels[rows].sort(stable=True).indices]
        cosines = self._own_cosines(embeddings[rows], labels[rows])
        dominant = own_centers.dominant(cosines, labels[rows], self.num_classes)
        own = cosines.gather(1, dominant[labels[rows]][:, None]).squeeze(1)
        outliers = rows[own < math.cos(math.radians(threshold))]
        if not return_dominant_centers:
            return outliers
        centers = self.W.new_zeros(self.W.shape[0], self.num_classes)
        classes = (dominant >= 0).nonzero().squeeze(1)
        centers[:, classes] = self.W[:, classes * self.sub_centers + dominant[classes]]
        return outliers, centers


class NormalizedSoftmaxLoss(_RowLosses, losses.NormalizedSoftmaxLoss):
    """Softmax over cosines without a margin, logits cos_nj / temperature; with DotProductSimilarity(normalize_embeddings=False),
    x_n·ŵ_j / temperature.

    Args:
        num_classes, embedding_size, temperature=0.05, **kwargs: theirs.

    Source: NormFace, arXiv 1704.06369.
    """

    def _head(self):
        normalize = bool(self.distance.normalize_embeddings)
        return {"margin": margins.NormSoftmax(), "scale": 1 / self.temperature, "normalize_features": normalize}

    def get_logits(self, embeddings):
        return self.get_cosine(embeddings) / self.temperature
