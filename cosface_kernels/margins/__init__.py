"""Every margin ψ: the function that replaces the cosine of a row with its own class. Everything here works on N-vectors.

    loss_n = -log( e^{s l_n ψ(cos θ_n)} / ( e^{s l_n ψ(cos θ_n)} + Σ_{j≠y_n} e^{s x̃_n·w̃_j} ) ),    cos θ_n of x_n and w_{y_n}

x̃ and w̃ are unit rows, or the rows as they are; l_n is the product of the lengths of x̃_n and w̃_{y_n}: 1 for unit rows. The
negatives do not depend on the margin, so a new one is a frozen dataclass with `psi` (formulas.py); what changes them is in
hard_negatives.py, whose classes are here too.

The numbers of a margin are numbers, or tensors: () for one, or (C,) for one of each class, which `for_labels` turns into one of
each row before ψ.
"""

from .base import Margin, class_tensors, inside, other_lengths, replaced, row_tensors  # noqa: F401 (for the loss and the heads)
from .checks import check, check_classes, check_kind  # noqa: F401
from .formulas import AdaFace, ArcFace, Combined, CosFace, LSoftmax, MagFace, NormSoftmax, Softmax, SphereFace
from .hard_negatives import CurricularFace, HardNegatives, InterclassFiltering, InterTopK, MVSoftmax

__all__ = [
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "HardNegatives",
    "InterTopK",
    "InterclassFiltering",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "NormSoftmax",
    "Softmax",
    "SphereFace",
    "inside",
]
