"""Checks of callers' arguments. Every message names the argument, what it got and what it takes. docs/errors.md lists them."""

import difflib
import math
import numbers
import sys
from typing import Literal, get_args

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = torch.float8_e4m3fn
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)

LONGEST_SHOWN = 100  # letters of a value in a message

# Types of arguments, for a type checker.
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "torch", "cpu", "triton"]
MemoryBudget = int | Literal["auto"]
TableFormat = Literal["float32", "bfloat16", "float8"]
StateFormat = Literal["float32", "bfloat16", "int8"]
Device = torch.device | str | int | None

NUMBERS = "a real number, or a float tensor of shape () or (C,)"  # what a margin's m may be
REDUCTIONS, BACKENDS = get_args(Reduction), get_args(Backend)
# Tensors that are what they seem. Checks of every call look for these first: together they take microseconds.
PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}
PLAIN_OR_NONE = {*PLAIN_TENSORS, type(None)}


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
    _check_integers("labels", "(N,)", labels)
    if not several and (labels.dim() != 1 or labels.shape[0] != features.shape[0]):
        hint = "; (N, K), several classes to a row, go with label_weights" if labels.dim() == 2 else ""
        raise ValueError(
            f"labels must have shape (N,) = ({features.shape[0]},), one class index for each row of features, "
            f"got {tuple(labels.shape)}{hint}"
        )
    if labels.device != features.device:
        raise ValueError(f"labels must be on the device of features ({features.device}), got {labels.device}")
    if classes is not None:
        _check_classes(classes, features)
    _check_one_kind(features=features, weight=weight, labels=labels, bias=bias, classes=classes)


def check_positives(labels, weights, features, most):
    """Check labels (N, K) of any integer dtype and their weights (N, K) of any float dtype."""
    _check_dense("features", "(N, D)", features)
    _check_integers("labels", "(N, K)", labels)
    _check_dense("label_weights", "(N, K)", weights)
    if weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"label_weights must be float16, bfloat16, float32 or float64, got {weights.dtype}")
    num_rows = features.shape[0] if features.dim() else 0
    if labels.dim() != 2 or labels.shape[0] != num_rows or not 1 <= labels.shape[1] <= most:
        raise ValueError(
            f"labels must have shape (N, K) with label_weights, N = {num_rows} and K from 1 to {most}, got {tuple(labels.shape)}"
        )
    if weights.shape != labels.shape:
        raise ValueError(f"label_weights must have the shape of labels, {tuple(labels.shape)}, got {tuple(weights.shape)}")
    for name, tensor in (("labels", labels), ("label_weights", weights)):
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the device of features ({features.device}), got {tensor.device}")


def _check_dense(name, shape, tensor):
    """Check that a value is a tensor with all of its numbers in memory."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor of shape {shape}, got {kind}")
    if tensor.is_meta:
        raise TypeError(f"{name} must have its numbers in memory, got a tensor on the device meta, which has shapes alone")
    # Tensors of torch.compile and vmap have no address.
    if type(tensor) not in PLAIN_TENSORS or torch.compiler.is_compiling() or _is_transformed(tensor):
        return
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() and stored < (last + 1) * tensor.element_size():
        raise ValueError(
            f"{name} must have its numbers in memory, got shape {tuple(tensor.shape)} over a storage of {stored} bytes"
        )


def check_read(name, shape, tensor):
    """Check that a value is a tensor whose numbers can be read now, by whoever has its address."""
    _check_dense(name, shape, tensor)
    if isinstance(tensor, torch._subclasses.FakeTensor):
        raise TypeError(f"{name} must have its numbers in memory, got a FakeTensor, which has shapes alone")


def _is_transformed(tensor):
    """True if torch.func wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_transforms(*tensors):
    """Raise inside torch.func.grad, vjp and jacrev: the operators' gradients are those of torch.autograd alone."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        while _is_transformed(tensor):
            if torch._C._functorch.is_gradtrackingtensor(tensor):
                raise RuntimeError(
                    "cosface_kernels has no gradient for torch.func (grad, vjp, jacrev): use backward(), torch.autograd.grad or "
                    "cosface_kernels.reference"
                )
            tensor = torch._C._functorch.get_unwrapped(tensor)


def _check_one_kind(**tensors):
    """Check that all tensors are fake, or none. Fake tensors have shapes and no numbers."""
    if torch.compiler.is_compiling() or {type(tensor) for tensor in tensors.values()} <= PLAIN_OR_NONE:
        return
    given = [tensor for tensor in tensors.values() if tensor is not None]
    fake = [name for name, tensor in tensors.items() if isinstance(tensor, torch._subclasses.FakeTensor)]
    if fake and len(fake) < len(given):
        raise TypeError(f"all tensors must be fake, or none, got a FakeTensor for {' and '.join(fake)} alone")


def _check_integers(name, shape, tensor):
    _check_dense(name, shape, tensor)
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def _check_classes(classes, features):
    """Check shape, dtype and device. Values are checked in ops/operators.py, as those of labels are."""
    _check_integers("classes", "(M,)", classes)
    if classes.dim() != 1 or classes.shape[0] < 1:
        raise ValueError(f"classes must have shape (M,), at least one class, got {tuple(classes.shape)}")
    if classes.device != features.device:
        raise ValueError(f"classes must be on the device of features ({features.device}), got {classes.device}")


def check_labels(labels):
    """Check labels (N,) of any integer dtype."""
    _check_integers("labels", "(N,)", labels)
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")


# What other libraries' heads call what is here a head's.
ELSEWHERE = {
    "s": "scale",
    "m": "margin",
    "W": "weight",
    "w": "weight",
    "kernel": "weight",
    "K": "centers_per_class",
    "sub_centers": "centers_per_class",
    "in_features": "embedding_size",
    "feat_dim": "embedding_size",
    "out_features": "num_classes",
    "predict": "topk(features, k)",
    "get_logits": "logits(features)",
    "forward_backward": "head(features, labels).backward()",
}


def check_names(kind, options, known):
    """Check the names of a class's keyword arguments that it passes on."""
    for name in options:
        if name not in known:
            alike = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {alike[0]}?" if alike else ""
            raise TypeError(f"{kind} has no option {name}{hint}")


def check_attribute(kind, name):
    """Raise for an attribute of other libraries' heads, which could be set without any effect."""
    if name in ELSEWHERE:
        raise AttributeError(f"{kind} has no attribute {name}; did you mean {ELSEWHERE[name]}?")


def check_call(features, labels, others, named):
    """Check that a head was called with features and labels, and nothing else."""
    if others or named:
        got = ", ".join([*(type(each).__name__ for each in others), *(f"{name}=" for name in named)])
        raise TypeError(f"a head is called as head(features, labels), got {got} too; {_instead(labels, others, named)}")
    if labels is None and isinstance(features, (tuple, list, dict)):
        raise TypeError(f"a head is called as head(features, labels), got one {type(features).__name__}: pass its parts apart")
    if features is None:
        raise TypeError("a head is called as head(features, labels), got no features")
    if labels is None:
        raise TypeError(
            "a head is called as head(features, labels), got no labels; without them head.logits(features) has the logits, "
            "N x C, and head.topk(features, k) the largest of them"
        )


def _instead(labels, others, named):
    """What to do in place of a call in the shape of another library."""
    first = others[0] if others else None
    if named.keys() & {"embeddings", "input", "x", "label", "target", "targets", "y"}:
        return "its two arguments are named features and labels"
    if isinstance(first, tuple) or named.keys() & {"indices_tuple", "ref_emb", "ref_labels"}:
        return "a miner's pairs go to the heads of cosface_kernels.compat.pytorch_metric_learning"
    if _are_integers(first) and _are_integers(labels):
        return "two classes of a row, as mixup has, are labels (N, 2) with label_weights (N, 2)"
    if _are_integers(first) and isinstance(labels, torch.Tensor):
        return "norms are not passed: margins.AdaFace takes them from features that were not normalised"
    if isinstance(first, torch.Tensor) or named.keys() & {"weight", "weights", "sample_weight"}:
        return 'for weights of rows make the head with reduction="none", and take (weights * losses).sum() / weights.sum()'
    if isinstance(first, torch.optim.Optimizer) or named.keys() & {"optimizer", "opt"}:
        return "an optimizer is not passed: it is given head.parameters(), and takes its step after backward"
    return "options are the constructor's, and many are attributes of the head"


def _are_integers(value):
    return isinstance(value, torch.Tensor) and value.dtype in INTEGER_DTYPES


def check_features(features, weight):
    """Check features (N, D) and weight (C, D) of any float dtype on one device."""
    for name, shape, tensor in (("features", "(N, D)", features), ("weight", "(C, D)", weight)):
        _check_dense(name, shape, tensor)
        if tensor.dtype not in FLOAT_DTYPES and not (tensor is weight and tensor.dtype == FLOAT8):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must have at least one class and one dimension, got shape {tuple(weight.shape)}")
    if features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features must have the embedding size of weight, D = {weight.shape[1]}, got shape {tuple(features.shape)}"
        )
    if weight.device != features.device:
        raise ValueError(f"weight must be on the device of features ({features.device}), got {weight.device}")


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
    _check_dense("weight_scale", shape, row_scale)
    if row_scale.dtype != torch.float32 or row_scale.shape != weight.shape[:1] or row_scale.device != weight.device:
        raise ValueError(
            f"weight_scale must be float32 of shape {shape} on the device of weight ({weight.device}), got {row_scale.dtype} of "
            f"shape {tuple(row_scale.shape)} on {row_scale.device}"
        )


def _check_bias(bias, weight):
    _check_dense("bias", "(C,), or None", bias)
    wanted = torch.float32 if weight.dtype == FLOAT8 else weight.dtype
    if bias.dtype != wanted:
        raise TypeError(f"bias must have the dtype of weight, {wanted}, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have a number for each row of weight, shape ({len(weight)},), got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight ({weight.device}), got {bias.device}")


def check_scale(scale, features=None):
    """Check a number, or a tensor of one, whose value is checked where it is read: on a GPU, reading waits for the device.

    features: what a tensor must go with, or None.
    """
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(scale, features)
        return
    check_number("scale", scale)
    if not 0 < scale <= 1e30:
        raise ValueError(f"scale must be in (0, 1e30], got {scale}")


def _check_scale_tensor(scale, features):
    wrong = TypeError if scale.dtype not in FLOAT_DTYPES else ValueError if scale.dim() else None
    if wrong is not None:
        raise wrong(f"scale must be a number, or a tensor of shape () and a float dtype, got {shown(scale)}")
    _check_dense("scale", "()", scale)
    if features is None:
        return
    _check_one_kind(features=features, scale=scale)
    if scale.device not in (features.device, torch.device("cpu")):
        raise ValueError(f"scale must be on the CPU or on the device of features ({features.device}), got {scale.device}")


def check_margin(margin):
    check_number("margin", margin)


def check_margins(margin):
    """Check a number, or a tensor of such, one for each class."""
    if isinstance(margin, torch.Tensor):
        check_numbers("margin", margin, -math.inf, math.inf)
    else:
        check_number("margin", margin, NUMBERS)


def check_probability(probability):
    check_number("probability", probability)
    if not 0 < float(probability) < 1:  # as a float: a fraction next to 1 may round to it
        raise ValueError(f"probability must be between 0 and 1, both excluded, got {probability}")


def check_ignore_index(ignore_index):
    check_integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index}")


def check_reduction(reduction):
    check_choice("reduction", reduction, REDUCTIONS)


def check_memory_budget(memory_budget):
    if memory_budget == "auto":
        return
    if not isinstance(memory_budget, numbers.Integral) or isinstance(memory_budget, bool):
        raise TypeError(f'memory_budget must be "auto" or a number of bytes (an int), got {shown(memory_budget)}')
    if memory_budget < 0:
        raise ValueError(f"memory_budget must be 0 bytes or more, got {memory_budget}")


def check_backend(backend):
    check_choice("backend", backend, BACKENDS)


def check_options(*, scale, ignore_index, memory_budget, backend, reduction="none", features=None):
    """Check the options that functions and modules have in common."""
    check_scale(scale, features)
    check_reduction(reduction)
    check_ignore_index(ignore_index)
    check_memory_budget(memory_budget)
    check_backend(backend)


def check_k(k, most, meaning="the number of classes"):
    check_integer("k", k)
    if not 0 <= k <= most:
        raise ValueError(f"k must be from 0 to {meaning}, {most}, got {k}")


def check_ids(ids, num_classes):
    """Class ids as an int64 tensor on the CPU. Raises for ids out of range, and for all of them."""
    try:
        found = ids if isinstance(ids, torch.Tensor) else torch.as_tensor([*ids], device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"ids must be class ids, a sequence or tensor of ints, got {shown(ids)}") from error
    check_read("ids", "(M,)", found)
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


def check_optimizer(optimizer, parameter):
    """Check that optimizer is a torch.optim.Optimizer with this parameter."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if not any(parameter is each for group in optimizer.param_groups for each in group["params"]):
        raise ValueError("optimizer must be the one that has the head's weight among its parameters")


def check_size(name, size):
    check_integer(name, size)
    if size < 1:
        raise ValueError(f"{name} must be 1 or more, got {size}")


def check_count(name, count):
    check_integer(name, count)
    if not 0 <= count < 2**63:
        raise ValueError(f"{name} must be in [0, 2^63), got {count}")


def check_rate(name, rate):
    check_number(name, rate)
    if not 0 < rate <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {rate}")


def check_flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_class_weight(class_weight, num_classes, device=None, label_smoothing=0.0):
    """Check weights (C,), or None."""
    if class_weight is None:
        return
    _check_dense("class_weight", f"(C,) = ({num_classes},)", class_weight)
    if class_weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"class_weight must be float16, bfloat16, float32 or float64, got {class_weight.dtype}")
    if class_weight.shape != (num_classes,):
        raise ValueError(f"class_weight must have shape (C,) = ({num_classes},), got {tuple(class_weight.shape)}")
    if device is not None and class_weight.device != device:
        raise ValueError(f"class_weight must be on the device of features ({device}), got {class_weight.device}")
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
    _check_dense("sample_correction", shape, correction)
    _check_one_kind(classes=classes, sample_correction=correction)
    if correction.dtype not in FLOAT_DTYPES:
        raise TypeError(f"sample_correction must be float16, bfloat16, float32 or float64, got {correction.dtype}")
    if correction.shape != classes.shape:
        raise ValueError(f"sample_correction must have shape {shape}, one number for each class, got {tuple(correction.shape)}")
    if correction.device != device:
        raise ValueError(f"sample_correction must be on the device of weight ({device}), got {correction.device}")
    if correction.requires_grad:
        raise ValueError("sample_correction must need no gradient: pass sample_correction.detach()")


def check_own_cosines(cosines, labels, centers_per_class):
    """Check cosines (N, K) and labels (N,)."""
    _check_dense("cosines", "(N, K)", cosines)
    _check_integers("labels", "(N,)", labels)
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
    _check_dense("hard_classes", shape, hard_classes)
    if hard_classes.dtype not in INTEGER_DTYPES:
        raise TypeError(f"hard_classes must have an integer dtype, got {hard_classes.dtype}")
    if hard_classes.dim() != 2 or hard_classes.shape[0] != num_classes or not hard_classes.shape[1]:
        raise ValueError(
            f"hard_classes must have shape {shape}, k classes to be drawn along with each, got {tuple(hard_classes.shape)}"
        )
    low, high = (int(each) for each in hard_classes.aminmax())
    if low < -1 or high >= num_classes:
        raise IndexError(f"hard_classes must be in [0, {num_classes}), or -1 for none, got {low if low < -1 else high}")


def check_label_smoothing(label_smoothing, centers_per_class):
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if label_smoothing and centers_per_class > 1:
        raise ValueError(
            "label_smoothing needs the mean of all logits, which of sub-centres only a second pass would find: "
            f"centers_per_class must be 1, got {centers_per_class}"
        )


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")


def check_at_least_zero(name, value):
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def check_more_than_zero(name, value):
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be more than 0, got {value}")


def check_number(name, value, wanted="a real number"):
    if type(value) is not float and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        hint = ", a text: float() makes a number of it" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}{hint}")
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_fields(owner, **ranges):
    """Check that each named field is a finite number within its closed range; those of owner.by_class may be tensors of such."""
    for name, (low, high) in ranges.items():
        value, by_class = getattr(owner, name), name in getattr(owner, "by_class", ())
        if by_class and isinstance(value, torch.Tensor):
            wrong = check_numbers(name, value, low, high)
        else:
            check_number(name, value, *([NUMBERS] if by_class else []))
            wrong = None if low <= value <= high else value
        if wrong is not None:
            unit = " radians" if high in (math.pi, math.pi / 2) else ""
            raise ValueError(f"{name} of {type(owner).__name__} must be from {low:g} to {high:g}{unit}, got {wrong}")


def check_numbers(name, tensor, low, high):
    """Check a tensor of numbers, () or (C,), and return the text of the first that is outside of a closed range, or None."""
    if not tensor.is_floating_point() or tensor.dim() > 1:
        raise TypeError(f"{name} must be {NUMBERS}, got {shown(tensor)}")
    _check_dense(name, "() or (C,), or a real number", tensor)
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return None
    wrong = (~(tensor.isfinite() & (tensor >= low) & (tensor <= high))).flatten().nonzero()
    if not len(wrong):
        return None
    place = int(wrong[0])
    return f"{float(tensor.flatten()[place])}" + (f" for class {place}" if tensor.dim() else "")


def shown(value):
    """The text of a value in a message. A tensor's shape and dtype: PyTorch's repr of one without memory ends the process."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if getattr(value, "ndim", 0):
        return f"an array of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…, a {type(value).__name__}"


def _is_finite(value):
    if torch.compiler.is_compiling():  # a number that moves from step to step is a symbol, which isfinite does not take
        return -sys.float_info.max <= value <= sys.float_info.max
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_integer(name, value):
    if type(value) is not int and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
