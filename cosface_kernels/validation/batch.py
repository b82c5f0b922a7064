"""Checks of the tensors of a batch and a class table: shapes, dtypes and devices that go together."""

import torch

from . import tensors
from .tensors import FLOAT8, INTEGER_DTYPES
from .values import check_size, shown


def check_tensors(features, weight, labels, bias=None, centers_per_class=1, classes=None, several=False):
    """Check features (N, D), weight (C, D), bias (C,) of any float dtype, labels (N,), classes (M,) of any integer dtype, all on
    one device. several: labels are (N, K), and `check_positives` has checked them."""
    check_features(features, weight)
    check_size("centers_per_class", centers_per_class)
    if weight.shape[0] % centers_per_class:
        raise ValueError(
            f"weight must have centers_per_class = {centers_per_class} rows for each class, got {weight.shape[0]} rows in all"
        )
    if bias is not None:
        _check_bias(bias, weight)
    tensors.check_integers("labels", "(N,)", labels)
    if not several and (labels.dim() != 1 or labels.shape[0] != features.shape[0]):
        hint = "; (N, K), several classes to a row, go with label_weights" if labels.dim() == 2 else ""
        raise ValueError(
            f"labels must have shape (N,) = ({features.shape[0]},), one class index for each row of features, "
            f"got {tuple(labels.shape)}{hint}"
        )
    tensors.check_device("labels", labels, "features", features.device)
    if classes is not None:
        _check_classes(classes, features)
    tensors.check_one_kind(features=features, weight=weight, labels=labels, bias=bias, classes=classes)


def check_features(features, weight):
    """Check features (N, D) and weight (C, D) of any float dtype on one device."""
    for name, shape, tensor, also in (("features", "(N, D)", features, ()), ("weight", "(C, D)", weight, (FLOAT8,))):
        tensors.check_floats(name, shape, tensor, also)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must have at least one class and one dimension, got shape {tuple(weight.shape)}")
    if features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features must have the embedding size of weight, D = {weight.shape[1]}, got shape {tuple(features.shape)}"
        )
    tensors.check_device("weight", weight, "features", features.device)


def _check_bias(bias, weight):
    tensors.check_dense("bias", "(C,), or None", bias)
    wanted = torch.float32 if weight.dtype == FLOAT8 else weight.dtype
    if bias.dtype != wanted:
        raise TypeError(f"bias must have the dtype of weight, {wanted}, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have a number for each row of weight, shape ({len(weight)},), got {tuple(bias.shape)}")
    tensors.check_device("bias", bias, "weight", weight.device)


def check_labels(labels):
    """Check labels (N,) of any integer dtype."""
    tensors.check_integers("labels", "(N,)", labels)
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")


def _check_classes(classes, features):
    """Check shape, dtype and device. Values are checked in ops/operators.py, as those of labels are."""
    tensors.check_integers("classes", "(M,)", classes)
    if classes.dim() != 1 or classes.shape[0] < 1:
        raise ValueError(f"classes must have shape (M,), at least one class, got {tuple(classes.shape)}")
    tensors.check_device("classes", classes, "features", features.device)


def check_positives(labels, weights, features, most):
    """Check labels (N, K) of any integer dtype and their weights (N, K) of any float dtype."""
    tensors.check_dense("features", "(N, D)", features)
    tensors.check_integers("labels", "(N, K)", labels)
    tensors.check_floats("label_weights", "(N, K)", weights)
    num_rows = features.shape[0] if features.dim() else 0
    if labels.dim() != 2 or labels.shape[0] != num_rows or not 1 <= labels.shape[1] <= most:
        raise ValueError(
            f"labels must have shape (N, K) with label_weights, N = {num_rows} and K from 1 to {most}, got {tuple(labels.shape)}"
        )
    if weights.shape != labels.shape:
        raise ValueError(f"label_weights must have the shape of labels, {tuple(labels.shape)}, got {tuple(weights.shape)}")
    for name, tensor in (("labels", labels), ("label_weights", weights)):
        tensors.check_device(name, tensor, "features", features.device)


def check_row_scale(weight, row_scale):
    """Check that a float8 weight has the scales of its rows."""
    if weight.dtype == FLOAT8 and row_scale is None:
        raise TypeError(
            'weight is float8 without the scales of its rows, which a head made with table_format="float8" has: call that head, '
            "or pass weight.float() times the scale of each row"
        )
    if row_scale is None:
        return
    shape = f"(R,) = ({len(weight)},)"
    tensors.check_dense("weight_scale", shape, row_scale)
    if row_scale.dtype != torch.float32 or row_scale.shape != weight.shape[:1] or row_scale.device != weight.device:
        raise ValueError(
            f"weight_scale must be float32 of shape {shape} on the device of weight ({weight.device}), got {row_scale.dtype} of "
            f"shape {tuple(row_scale.shape)} on {row_scale.device}"
        )


def check_class_weight(class_weight, num_classes, device=None, label_smoothing=0.0):
    """Check weights (C,), or None."""
    if class_weight is None:
        return
    tensors.check_floats("class_weight", f"(C,) = ({num_classes},)", class_weight)
    if class_weight.shape != (num_classes,):
        raise ValueError(f"class_weight must have shape (C,) = ({num_classes},), got {tuple(class_weight.shape)}")
    if device is not None:
        tensors.check_device("class_weight", class_weight, "features", device)
    if label_smoothing:
        raise ValueError(
            "class_weight and label_smoothing exclude each other: F.cross_entropy then weights every class's term, which the "
            "pass over the table does not sum"
        )


def check_correction(correction, classes, device):
    """Check sample_correction where it is a tensor (M,), one number for each of classes (M,)."""
    if not isinstance(correction, torch.Tensor):
        return
    if classes is None:
        raise ValueError("sample_correction may be a tensor with classes alone, one number for each, got classes = None")
    shape = f"(M,) = ({len(classes)},)"
    tensors.check_floats("sample_correction", shape, correction)
    tensors.check_one_kind(classes=classes, sample_correction=correction)
    if correction.shape != classes.shape:
        raise ValueError(f"sample_correction must have shape {shape}, one number for each class, got {tuple(correction.shape)}")
    tensors.check_device("sample_correction", correction, "weight", device)
    if correction.requires_grad:
        raise ValueError("sample_correction must need no gradient: pass sample_correction.detach()")


def check_own_cosines(cosines, labels, centers_per_class):
    """Check cosines (N, K) and labels (N,)."""
    tensors.check_dense("cosines", "(N, K)", cosines)
    tensors.check_integers("labels", "(N,)", labels)
    shape = (len(labels) if labels.dim() == 1 else "N", centers_per_class)
    if labels.dim() != 1 or cosines.shape != shape:
        raise ValueError(
            f"cosines must have shape (N, K), K = {centers_per_class} centres to a class, and labels (N,), got "
            f"{tuple(cosines.shape)} and {tuple(labels.shape)}"
        )


def check_hard_classes(hard_classes, num_classes):
    """Check (C, k) class numbers, -1 for none, or None."""
    if hard_classes is None:
        return
    shape = f"(C, k), C = {num_classes}"
    tensors.check_integers("hard_classes", shape, hard_classes)
    if hard_classes.dim() != 2 or hard_classes.shape[0] != num_classes or not hard_classes.shape[1]:
        raise ValueError(
            f"hard_classes must have shape {shape}, k classes to be drawn along with each, got {tuple(hard_classes.shape)}"
        )
    low, high = (int(each) for each in hard_classes.aminmax())
    if low < -1 or high >= num_classes:
        raise IndexError(f"hard_classes must be in [0, {num_classes}), or -1 for none, got {low if low < -1 else high}")


def check_ids(ids, num_classes):
    """Class ids as an int64 tensor on the CPU. Raises for ids out of range, and for all of them."""
    try:
        found = ids if isinstance(ids, torch.Tensor) else torch.as_tensor([*ids], device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"ids must be class ids, a sequence or tensor of ints, got {shown(ids)}") from error
    tensors.check_read("ids", "(M,)", found)
    if not found.numel():
        return found.flatten().long()
    if found.dtype not in INTEGER_DTYPES:
        raise TypeError(f"ids must be class ids, ints, got {found.dtype}")
    if found.dim() != 1:
        raise ValueError(f"ids must have one dimension, got shape {tuple(found.shape)}")
    found = found.long().cpu()
    outside = found[(found < 0) | (found >= num_classes)]
    if len(outside):
        raise IndexError(f"ids must be from 0 to {num_classes - 1}, got {outside[:5].tolist()}")
    if len(found.unique()) == num_classes:
        raise ValueError(f"ids must leave at least one class, got all {num_classes}")
    return found
