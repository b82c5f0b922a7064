"""What goes beside a margin, in any combination, against the formulas of docs/margins.md in float64 with N x C logits.

Label smoothing, weights of classes, a scale that is a tensor or learnt, hard negatives, several classes to a row, numbers by
class, statistics, sampled classes, hard classes, float8 tables: the loss, every gradient, and the statistics; an error by name
for what does not go together.
"""

import math
import re

import torch
import torch.nn.functional as F
from margin_rows import batch, steepness
from rounding import SIZE, tolerance

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, cosface_loss, margin_softmax_loss
from cosface_kernels.ops.formats import FLOAT8

from . import tables
from .formulas import BY_CLASS, HARD, MARGINS, Batch, expected, is_head, oracle_of, sizes_of, trained, with_gradients
from .losses import DTYPES, defaults, is_low, laid_out, product_dtype

RATE = 0.4  # of sampled classes

SPACE = {
    "margin": [*MARGINS, "CosFace", "CosFace", "ArcFace", "CosFace by class", "ArcFace x3"],
    "call": ["function", "head", "head", "cosface_loss", "CosFaceLoss"],
    "training": [True, True, False],
    "backend": ["torch", "cpu", "auto", "cpu", "auto", "triton"],
    "rows": [1, 2, 3, 5, 8, 17, 33],
    "classes": [2, 3, 7, 64, 130, 300],
    "features": [*DTYPES],
    "weight": [*DTYPES, "float8"],
    "autocast": [False, False, True],
    "default": ["float32", "float32", "float64", "bfloat16"],
    "strides": ["contiguous", "transposed", "sliced", "offset"],
    "ignored": [0, 0, 1, 2],  # 0: none, k: every k + 1-th row
    "scale": ["default", "default", "16", "tensor", "learnt", "learnt"],
    "label_smoothing": [0.0, 0.0, 0.0, 0.1, 1.0],
    "class_weight": ["", "", "", "some", "zeros"],
    "negatives": ["", "", "", *HARD],
    "positives": [0, 0, 0, 0, 1, 2, 8, 32],  # 0: labels (N,)
    "statistics": [False, True],
    "sampled": ["", "", "sampled", "corrected", "numbers"],
    "hard_classes": [0, 0, 1, 3],
    "reduction": ["none", "mean", "sum"],
    "memory_budget": ["auto", 0, 1000, 10**9],
    "small_slabs": [False, True],
    "threads": [1, 1, 2],
    "clash": [False] * 7 + [True],  # whether options stay that exclude each other
    "seed": [*range(1000)],
}


def settle(case):
    case = dict(case) if case["clash"] else _without_clashes(case)
    row = MARGINS[case["margin"]]
    if case["call"] in ("cosface_loss", "CosFaceLoss") and case["margin"] not in ("CosFace", "CosFace by class"):
        case["call"] = "head" if is_head(case) else "function"
    if case["call"] == "cosface_loss" and case["positives"]:
        case["call"] = "function"  # which alone takes several
    if case["weight"] == "float8" and not is_head(case):
        case["weight"] = "float32"  # float8 tables are heads'
    if "float64" in (case["features"], case["weight"]):
        case["autocast"] = False
        case["backend"] = "torch" if case["backend"] == "torch" else "auto"  # the others have no float64
    if row.centers > 1:  # which of two centres is nearest is a matter of 16 bits' rounding
        wide = {name: "float32" for name in ("features", "weight") if case[name] in ("bfloat16", "float16")}
        case |= {"autocast": False, **wide}
    if case["backend"] == "triton":  # interpreted
        case |= {"rows": min(case["rows"], 8), "classes": min(case["classes"], 64)}
    if case["negatives"] and is_low(case):  # or every row has a class so near its threshold that rounding decides
        case["classes"] = min(case["classes"], 7)
    if is_head(case):
        case["sampled"] = {"numbers": "corrected"}.get(case["sampled"], case["sampled"]) if case["training"] else ""
    return case


def _without_clashes(case):
    """The case with the simplest value of what does not go with another option."""
    row = MARGINS[case["margin"]]
    if case["positives"] and row.centers > 1:
        case = case | {"positives": 0}
    if case["positives"]:
        case = case | {"class_weight": "", "label_smoothing": 0.0, "negatives": "", "statistics": False}
    if case["negatives"] and (row.raw or case["scale"] == "learnt"):
        case = case | {"negatives": ""}
    if case["label_smoothing"] and (case["negatives"] or case["class_weight"] or row.centers > 1):
        case = case | {"label_smoothing": 0.0}
    return dict(case)


def refusal(case):
    """A pattern of what the error is about where options do not go together, or None."""
    row, several = MARGINS[case["margin"]], case["positives"] > 0
    smoothed, weighted, hard = case["label_smoothing"] > 0, bool(case["class_weight"]), bool(case["negatives"])
    clashes = {
        "centers_per_class must be 1": smoothed and row.centers > 1,
        "class_weight and label_smoothing exclude each other": weighted and smoothed,
        "negatives go with cosines": hard and row.raw,
        "negatives and label_smoothing exclude each other": hard and smoothed,
        "negatives go with a scale that is a number": hard and case["scale"] == "learnt",
        "label_weights and class_weight exclude": several and weighted,
        "label_weights go with one centre to a class": several and row.centers > 1,
        "label_weights and label_smoothing exclude": several and smoothed,
        "label_weights go with negatives as they are": several and hard,
        "label_weights and return_statistics=True exclude": several and case["statistics"],
    }
    return "|".join(message for message, clash in clashes.items() if clash) or None


def check(case):
    if case["backend"] == "triton":
        import interpreter

        interpreter.install()
    torch.set_num_threads(case["threads"])
    wanted = refusal(case)
    with defaults(case):
        if wanted is not None:
            return _assert_refused(case, wanted)
        count = max(3, min(8, 2000 // (case["rows"] * case["classes"]))) if case["backend"] != "triton" else 3
        batches = [_batch(case, 1000 * case["seed"] + number) for number in range(count)]
        results = [_one(case, each) for each in batches]
    row = MARGINS[case["margin"]]
    steepest = steepness(row, batches[0].features.double(), batches[0].weight.double()) * batches[0].scale / row.scale
    if case["negatives"]:
        steepest *= max(1.0, HARD[case["negatives"]].negatives.bound) ** 2
    steepest += max(float(each.sample.by_class.max()) if each.sample else 0.0 for each in batches)
    for name in results[0]:
        _assert_right(
            case, steepest, name, *(torch.cat(tensors) for tensors in zip(*(each[name] for each in results), strict=True))
        )


def _assert_refused(case, wanted):
    try:
        _ours(case, _batch(case, case["seed"]))
    except ValueError as error:
        assert re.search(wanted, str(error)), f"the error is not about {wanted}: {error}"
    else:
        raise AssertionError(f"no error about {wanted}")


def _batch(case, seed):
    """A Batch of the dtypes to test, without rows whose value a rounding decides."""
    row, generator = MARGINS[case["margin"]], torch.Generator().manual_seed(seed)
    num_rows, num_classes = case["rows"], case["classes"]
    features, weight, labels, *bias = batch(row, num_rows=num_rows, num_classes=num_classes, seed=seed)
    features, weight = features.to(DTYPES[case["features"]]), tables.stored(weight, DTYPES.get(case["weight"], FLOAT8))
    bias = bias[0].to(weight.dtype) if bias else None
    spread = torch.linspace(0, 1, num_classes, dtype=torch.float64)[torch.randperm(num_classes, generator=generator)]
    _, ranges, _ = BY_CLASS.get(case["margin"].removesuffix(" by class"), (None, {}, None))
    is_by_class = case["margin"].endswith("by class")
    numbers = {name: (low + (high - low) * spread).float() for name, (low, high) in ranges.items()} if is_by_class else {}
    class_weight = None
    if case["class_weight"]:
        class_weight = (spread.flip(0) + 0.1).float() * (1 if case["class_weight"] == "some" else torch.arange(num_classes) % 2)
    label_weights = None
    if case["positives"]:
        more = torch.randint(num_classes, (num_rows, case["positives"] - 1), generator=generator)
        labels = torch.cat([labels[:, None], more.where(torch.rand(more.shape, generator=generator) < 0.7, -1)], 1)
        label_weights = torch.rand(labels.shape, generator=generator)
    if case["ignored"]:
        labels[:: case["ignored"] + 1] = -100
    scale = {"default": row.scale, "16": 16.0}.get(case["scale"], 24.0 if row.scale == 64 else 1.0)
    if case["scale"] == "learnt" and is_head(case):  # its log_scale has float32
        scale = float(torch.tensor(scale, dtype=torch.float32).log().exp())
    made = _sampled(case, Batch(features, weight, bias, labels, label_weights, class_weight, numbers, scale))
    while refusal(case) is None and (unsure := _unsure(case, made)).any():  # AdaFace's ψ depends on the rows that stay
        made = _sampled(case, made._replace(labels=torch.where(unsure, -100, made.labels)))
    return made


def _sampled(case, given):
    return given._replace(sample=tables.sample(case, given.labels, RATE)) if case["sampled"] else given


def _unsure(case, given):
    """Which labels count though a rounding decides on which side of a jump of ψ, or of a threshold, something is."""
    row, labels = MARGINS[case["margin"]], given.labels if case["positives"] else given.labels[:, None]
    x, w = F.normalize(given.features.double()), F.normalize(given.weight.double()).unflatten(0, (-1, row.centers))
    angles = (x[:, None, None] * w[labels.clamp(min=0)]).sum(3).clamp(-1, 1).acos()  # (N, K, centres)
    jumps = [[*row.jumps(norm)] or [torch.inf] for norm in given.features.double().norm(dim=1).tolist()]
    distance = (angles[..., None] - torch.tensor(jumps, dtype=torch.float64)[:, None, None]).abs().amin((2, 3))
    near = distance < (0.1 if is_low(case) else 1e-3)
    if case["negatives"]:
        oracle = oracle_of(case, given, given.leaves(torch.float64), given.scale)
        distance = (oracle.products - oracle.threshold).abs().masked_fill(oracle.own, torch.inf).amin(1, keepdim=True)
        near |= distance < max(1, row.lipschitz) ** 2 * (0.01 if is_low(case) else 1e-5)
    return (near & (labels >= 0)).reshape(given.labels.shape)


def _ours(case, given):
    """({name: losses or gradient}, the statistics or None)."""
    row, leaves = MARGINS[case["margin"]], given.leaves(None)
    margin = row.margin
    if given.numbers:
        numbers = given.numbers if is_head(case) else {name: leaves[name] for name in given.numbers}
        margin = BY_CLASS[case["margin"].removesuffix(" by class")][0](**numbers)
    scale, is_learnt = given.scale, case["scale"] == "learnt"
    if case["scale"] == "tensor" or (is_learnt and not is_head(case)):
        scale = torch.tensor(given.scale, dtype=product_dtype(case), requires_grad=is_learnt)
    options = {name: case[name] for name in ("backend", "memory_budget", "reduction", "label_smoothing")}
    options |= {"margin": margin, "scale": scale, "class_weight": given.class_weight}
    options |= {"negatives": HARD[case["negatives"]].negatives if case["negatives"] else None}
    call = {"return_statistics": True} if case["statistics"] else {}
    call |= {"label_weights": given.label_weights} if case["positives"] else {}
    features = laid_out(leaves["dX"], case["strides"])
    torch.set_default_dtype(DTYPES[case["default"]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
        run = _of_a_head if is_head(case) else _of_a_function
        found, log_scale = run(case, given, leaves, features, options, call)
    torch.set_default_dtype(torch.float32)
    losses, statistics = found if case["statistics"] else (found, None)
    leaves = trained(case, given, leaves)
    if is_learnt:
        leaves["ds"] = log_scale if is_head(case) else scale
    return with_gradients(losses, leaves), statistics


def _of_a_function(case, given, leaves, features, options, call):
    """(what it returns, None)."""
    if given.sample is not None:
        call |= {"classes": given.sample.classes, "sample_correction": tables.correction_of(case, given.sample)}
    arguments = features, leaves["dW"], given.labels
    if case["call"] == "cosface_loss":
        return cosface_loss(*arguments, **options | call | {"margin": options["margin"].m}), None
    extra = {"bias": leaves.get("db")} | MARGINS[case["margin"]].options
    return margin_softmax_loss(*arguments, **options, **extra, **call), None


def _of_a_head(case, given, leaves, features, options, call):
    """(what it returns, its log_scale)."""
    row, is_float8 = MARGINS[case["margin"]], case["weight"] == "float8"
    made = {"learnable_scale": case["scale"] == "learnt", "hard_classes": tables.hard_classes(case)} | options
    made |= {"table_format": "float8"} if is_float8 else {"dtype": given.weight.dtype}
    if case["sampled"] or not case["training"]:
        made |= {"sample_rate": RATE, "sample_seed": case["seed"], "sample_correction": case["sampled"] == "corrected"}
    if case["call"] == "CosFaceLoss":
        head = CosFaceLoss(SIZE, case["classes"], **made | {"margin": options["margin"].m})
    else:
        head = MarginSoftmaxLoss(SIZE, case["classes"], bias=row.bias, **made, **row.options)
    head.train(case["training"])
    own = {"bias": leaves["db"]} if row.bias else {}
    if is_float8:
        assert torch.equal(tables.fill(head.weight, head.weight_scale, given.weight), given.weight), "rows are encoded otherwise"
    else:
        own |= {"weight": leaves["dW"]}
    return torch.func.functional_call(head, own, (features, given.labels), call), head.log_scale if made[
        "learnable_scale"
    ] else None


def _one(case, given):
    """{name: (ours, exact, bound, the size of the terms that cancel in exact)}."""
    ours, statistics = _ours(case, given)
    exact, oracle = expected(case, given, torch.float64)
    bound, _ = expected(case, given, torch.float32, is_low(case))
    if statistics is not None:
        _assert_statistics(case, given, statistics, oracle)
    sizes = sizes_of(case, given, oracle)
    return {name: (ours[name], exact[name], bound[name], sizes.get(name, torch.zeros_like(exact[name]))) for name in exact}


def _assert_statistics(case, given, found, oracle):
    """Those of the products as they are, each off by no more than the rounding of unit rows, or of rows with their lengths."""
    row = MARGINS[case["margin"]]
    counted, wide = oracle.counted, torch.finfo(_sum_dtype(case)).eps
    length = given.features.double().norm(dim=1).amax() if row.raw else 1.0
    length = length * (given.weight.double().norm(dim=1).amax() if "weight" in row.raw else 1.0)
    within = 2 * float(length) * ((torch.finfo(torch.bfloat16).eps if is_low(case) else wide) + SIZE * wide)
    assert not any(each.requires_grad for each in found)
    assert found.target_cosine[~counted].isnan().all() and found.probability[~counted].isnan().all()
    assert (found.negative_class[~counted] == -1).all() and not found.correct[~counted].any()
    if not counted.any():
        return
    kept = given.kept(case)
    own = oracle.products[oracle.own]
    products = oracle.products.masked_fill(oracle.own, -torch.inf)[counted]
    found = type(found)(*(each[counted] for each in found))
    largest = products.amax(1)
    if len(kept) == 1:
        assert (found.negative_class == -1).all() and (found.negative_cosine == -torch.inf).all() and found.correct.all()
        return
    assert (found.target_cosine - own).abs().amax() <= within, "target_cosine"
    assert (found.negative_cosine - largest).abs().amax() <= within, "negative_cosine"
    place = torch.searchsorted(kept, found.negative_class)
    assert torch.equal(kept[place], found.negative_class), "negative_class does not take part"
    assert (products.gather(1, place[:, None])[:, 0] >= largest - 2 * within).all(), "negative_class"
    assert torch.equal((found.correct == (own > largest)) | ((own - largest).abs() <= 2 * within), torch.ones_like(found.correct))
    probability = torch.sigmoid(given.scale * own - oracle.lse[counted])
    slope = 1 + (4 if case["negatives"] else 0)
    assert (found.probability - probability).abs().amax() <= given.scale * within * slope, "probability"


def _assert_right(case, steepest, name, ours, exact, bound, size):
    """By the rule of tests/cases.py, as losses.py relaxes it, and a rounding of the terms that cancel."""
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    row, products = MARGINS[case["margin"]], _sum_dtype(case)
    rounded = tolerance(products, steepest)
    if is_low(case):
        rounded = steepest * torch.finfo(torch.bfloat16).eps / 2 / math.sqrt(SIZE)
        size = size + (name == "loss")  # the exponent itself is off by that
    if name == "ds":  # which is multiplied by s once more
        rounded += torch.finfo(ours.dtype).eps
    if name.startswith("m"):  # a class's rows are added in the dtype of its number
        rounded += math.sqrt(case["rows"] * max(1, case["positives"])) * torch.finfo(ours.dtype).eps / 2
    if products == torch.float64:
        bound = exact + (bound.double() - exact) * 2.0**-28
        if row.margin is not None and row.margin.needs_norm and name == "dX":
            rounded += torch.finfo(ours.dtype).eps
    # A sum of rows, each rounded by itself: nothing averages over D.
    of_terms = max(rounded, torch.finfo(torch.bfloat16).eps / 2) if is_low(case) and name in ("dX", "dW") else rounded
    for what, norm, luck in (("", torch.Tensor.norm, 3), (" in the worst row", _largest_row, 4)):
        error, allowed = norm(ours.double() - exact), luck * norm(bound.double() - exact)
        allowed += (torch.finfo(ours.dtype).eps / 2 + rounded) * norm(exact) + of_terms * norm(size.double())
        allowed += torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps * math.sqrt(exact.numel())
        assert error <= allowed, f"{name}{what}: error {error:.3e}, allowed {allowed:.3e}, size {norm(exact):.3e}"


def _sum_dtype(case):
    """The dtype of what is no product: float32 where a head keeps statistics, which are."""
    is_kept = is_head(case) and (MARGINS[case["margin"]].state or case["negatives"] == "CurricularFace")
    return torch.float32 if is_kept else product_dtype(case)


def _largest_row(tensor):
    return tensor.flatten(1).norm(dim=1).amax() if tensor.dim() > 1 else tensor.abs().amax()
