"""Losses and both gradients against float64, by the rule of tests/cases.py."""

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from cases import assert_as_accurate, evaluate, make
from margin_rows import ROWS, batch, steepness, written_out
from rounding import SIZE, tolerance

from cosface_kernels import CosFaceLoss, cosface_loss, cosine_lse, margin_softmax_loss, reference
from cosface_kernels.ops import slabs
from cosface_kernels.ops.formats import FLOAT8

from . import tables

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64", "float16")}
INTEGERS = ("int64", "int32", "int16", "uint8", "int8", "uint16", "uint64")
CALLS = ("cosface_loss", "cosine_lse", "CosFaceLoss")  # three ways to the same loss
SPACE = {
    # The first three with inputs of every kind, and the reference as oracle.
    "margin": [*CALLS, *ROWS],
    "backend": ["torch", "cpu", "auto", "cpu", "auto", "triton"],
    "rows": [1, 2, 3, 5, 8, 17, 33],
    "classes": [2, 1, 3, 7, 64, 130, 300, 1000],
    "size": [2, 1, 3, 8, 17, 31, 64, 100],
    "features": [*DTYPES],
    "weight": [*DTYPES, "float8"],
    "autocast": [False, False, True],
    "default": ["float32", "float32", "float32", "float64", "bfloat16", "float16"],
    "strides": ["contiguous", "transposed", "sliced", "offset"],
    "weight_strides": ["contiguous", "transposed", "sliced", "offset"],
    "labels": [*INTEGERS],
    "ignored": [0, 0, 1, 2],  # 0: none, k: every k-th row
    "inputs": ["uniform", "peaked", "hard", "adversarial", "tiny", "large", "nan", "inf"],
    "upstream": [0, -40, 40],  # a power of two
    "scale": [None, 1.0, 16.0, 100.0, 1000.0, 1e-3],
    "m": [0.35, 0.0, -0.5, 1.0],
    "reduction": ["none", "mean", "sum"],
    "memory_budget": ["auto", 0, 1000, 10**9],
    "sampled": [False, False, True],
    "largest": [False, True],  # whether cosine_lse returns it
    "small_slabs": [False, True],
    "threads": [1, 1, 2],
    "seed": [*range(1000)],
}


def settle(case):
    case = dict(case)
    if case["weight"] == "float8":  # a head's
        case["margin"] = "CosFaceLoss"
    if case["margin"] not in CALLS:  # what is divided by a norm needs one, and ψ of an angle is steep at its ends
        case |= {"inputs": "uniform", "scale": None, "m": 0.35, "size": SIZE, "sampled": False}
        case["classes"] = max(case["classes"], 2)
        if ROWS[case["margin"]].raw or ROWS[case["margin"]].penalty(torch.ones(1)).any():
            case["upstream"] = 0
    if case["margin"] == "cosine_lse":
        case["classes"] = max(case["classes"], 2)  # of one class there is no negative, and log 0 has no gradient
    if case["margin"] != "cosface_loss":
        case["sampled"] = False  # the classes that are told are cosface_loss's
    if "float16" in (case["features"], case["weight"]) and case["inputs"] not in ("uniform", "nan", "inf"):
        case["inputs"] = "uniform"  # 1e15 is none, and a gradient of 1e-9 is no float16
    if "float16" in (case["features"], case["weight"]):
        case["upstream"] = 0
    if "float64" in (case["features"], case["weight"]):
        case["autocast"] = False
        case["backend"] = "torch" if case["backend"] == "torch" else "auto"  # the others have no float64
    if ROWS.get(case["margin"], ROWS["CosFace"]).centers > 1:  # which of two centres is nearest is a matter of 16 bits' rounding
        wide = {name: "float32" for name in ("features", "weight") if case[name] in ("bfloat16", "float16")}
        case |= {"autocast": False, **wide}
    if case["backend"] == "triton":  # interpreted
        case |= {"rows": min(case["rows"], 8), "classes": min(case["classes"], 64), "size": min(case["size"], 17)}
    if case["inputs"] in ("nan", "inf"):
        case |= {"reduction": "none", "scale": 1.0, "sampled": False}
    if case["classes"] > 127 and case["labels"] in ("int8",):
        case["labels"] = "int16"
    if case["classes"] > 255 and case["labels"] == "uint8":
        case["labels"] = "int16"
    return case


def check(case):
    if case["backend"] == "triton":
        import interpreter

        interpreter.install()
    torch.set_num_threads(case["threads"])
    with defaults(case):
        count = max(3, min(8, 2000 // (case["rows"] * case["classes"])))
        results = [_one(case, 1000 * case["seed"] + number) for number in range(count if case["backend"] != "triton" else 3)]
    scale = _largest_exponent(case, *_tensors(case, 1000 * case["seed"])[:2])
    names = ("loss", "dX") if case["weight"] == "float8" else ("loss", "dX", "dW")
    for name, triples in zip(names, zip(*results, strict=True), strict=True):
        _assert_right(case, scale, name, *(torch.cat(tensors) for tensors in zip(*triples, strict=True)))


@contextlib.contextmanager
def defaults(case):
    """The default dtype, and the size of slabs."""
    before = slabs.SLAB_CLASSES_MIN, slabs.SLAB_CLASSES_MAX
    if case["small_slabs"]:
        slabs.SLAB_CLASSES_MIN, slabs.SLAB_CLASSES_MAX = 1, 128
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        slabs.SLAB_CLASSES_MIN, slabs.SLAB_CLASSES_MAX = before


def _one(case, seed):
    """((ours, exact, bound) of the loss, of dX, and where autograd has it of dW)."""
    features, weight, labels, *bias = _tensors(case, seed)
    row = ROWS.get(case["margin"])
    low = is_low(case)
    ours, plain = _functions(case, row, bias, labels)
    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream * 2.0 ** case["upstream"]

    def run(function, enabled, *tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return evaluate(function, *tensors)

    given = laid_out(features, case["strides"]), laid_out(weight, case["weight_strides"])
    torch.set_default_dtype(DTYPES[case["default"]])
    run_ours = run if case["weight"] != "float8" else _of_features_alone
    got = run_ours(ours, case["autocast"], *given, labels.to(getattr(torch, case["labels"])), upstream)
    torch.set_default_dtype(torch.float32)
    exact = run(plain, False, features.double(), weight.double(), labels, upstream)
    bound = run(plain, low, features.float(), weight.float(), labels, upstream)
    got = [tensor.to_dense() for tensor in got]
    # Where numbers cancel, as in a loss near 0 and a gradient along its row, the exact ones are what rounding leaves of them.
    least = 64 * torch.finfo(torch.float64).eps * _largest_exponent(case, features, weight)
    slope = least * 2.0 ** case["upstream"]
    if case["size"] == 1:  # a row has one direction, along which it has no gradient: ours are the rounding of the products alone
        slope = (
            16 * _largest_exponent(case, features, weight) * torch.finfo(product_dtype(case)).eps * float(upstream.abs().sum())
        )
    slopes = slope, slope
    if low and case["margin"] in CALLS:  # where equal classes cancel, what rounding them to 16 bits leaves
        pulls = torch.finfo(torch.bfloat16).eps / 2 * upstream.abs().max() * _pulls(case, features, weight, labels)
        slopes = [pulls.sum(dim).clamp(min=slope)[:, None] for dim in (1, 0)]
    lengths = (rows.double().nan_to_num().norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (features, weight))
    floors = least, *(each / length for each, length in zip(slopes, lengths, strict=True))
    got = [_no_nearer(*each) for each in zip(got, exact, floors, strict=False)]
    return [*zip(got, exact, bound, strict=False)]


def _of_features_alone(function, enabled, features, weight, labels, upstream):
    """(losses, dX)."""
    features = features.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        losses = function(features, weight, labels)
    return losses.detach(), *torch.autograd.grad(losses, features, upstream.to(losses.dtype))


def _pulls(case, features, weight, labels):
    """s |∂loss_n / ∂z_nj|, (N, C) float64."""
    scale, counted = case["scale"] or 64.0, (labels >= 0) & (labels < len(weight))
    targets = F.one_hot(torch.where(counted, labels, 0), len(weight))
    logits = reference.logits(features.double(), weight.double(), scale=scale) - scale * case["m"] * targets
    if case["sampled"]:
        logits[:, 1::2] = torch.where(targets[:, 1::2] > 0, logits[:, 1::2], -torch.inf)
    return scale * (logits.softmax(1) - targets).abs().nan_to_num() * counted[:, None]


def _no_nearer(ours, exact, floor):
    """Ours, and the exact number where the two differ by less than what the exact one is off by."""
    return torch.where((ours - exact).abs() < floor, exact, ours.double()).to(ours.dtype)


def is_low(case):
    """True if products have 16 bits."""
    is_wide = "float64" in (case["features"], case["weight"])
    return not is_wide and (case["autocast"] or case["features"] in ("bfloat16", "float16"))


def product_dtype(case):
    """The dtype in which what is no product of 16 bits is multiplied and added."""
    return torch.float64 if "float64" in (case["features"], case["weight"]) else torch.float32


def _tensors(case, seed):
    """(features, weight, labels[, bias]) of the dtypes to test."""
    dtypes = DTYPES[case["features"]], DTYPES.get(case["weight"], FLOAT8)
    if case["margin"] in CALLS:
        kind = case["inputs"] if case["inputs"] in ("peaked", "hard", "adversarial") else "uniform"
        features, weight, labels = make(kind, case["rows"], case["classes"], case["size"], seed=seed)
        factor = {"tiny": 1e-9, "large": 1e15}.get(case["inputs"], 1.0)
        features, weight = features * factor, weight * factor
        if case["inputs"] in ("nan", "inf"):
            (features if seed % 2 else weight)[0, -1] = float(case["inputs"])
        bias = ()
    else:
        row = ROWS[case["margin"]]
        features, weight, labels, *bias = batch(row, num_rows=case["rows"], num_classes=case["classes"], seed=seed)
        far = _far_from_jumps(case, features.to(dtypes[0]), weight.to(dtypes[1]), labels)
        features, labels = features[far], labels[far]
    if case["ignored"]:
        labels[:: case["ignored"] + 1] = -100 if case["labels"].startswith("int") else case["classes"]
    return features.to(dtypes[0]), tables.stored(weight, dtypes[1]), labels, *(each.to(dtypes[1]) for each in bias)


def laid_out(tensor, strides):
    """The same numbers with another memory layout."""
    rows, size = tensor.shape
    if strides == "transposed":
        return tensor.T.contiguous().T
    if strides == "sliced":
        return torch.cat([tensor, tensor.new_full((rows, 3), torch.nan)], 1)[:, :size]
    if strides == "offset":
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(rows, size)
    return tensor


def _functions(case, row, bias, labels):
    """(ours, plain), each (features, weight, labels) -> (N,)."""
    ignored = -100 if case["labels"].startswith("int") else case["classes"]
    options = {"reduction": case["reduction"], "ignore_index": ignored}
    own = options | {"memory_budget": case["memory_budget"], "backend": case["backend"]}
    if row is None:
        shared = {"scale": case["scale"] or 64.0, "margin": case["m"]}
        plain = partial(reference.cosface_loss, **shared, **options)
        classes = None
        if case["sampled"]:
            classes = torch.unique(torch.cat([labels[labels != ignored], torch.arange(0, case["classes"], 2)]))
            plain = _of_classes(plain, classes, ignored)
        ours = {
            "cosface_loss": partial(cosface_loss, **shared, **own, classes=classes),
            "cosine_lse": partial(_of_two_vectors, case, **shared, **own),
            "CosFaceLoss": partial(_of_a_head, case["weight"], **shared, **own),
        }[case["margin"]]
    else:
        given = {"bias": bias[0]} if bias else {}
        ours = partial(margin_softmax_loss, margin=row.margin, **row.options, **given, **own)

        def plain(features, weight, labels):
            given = [each.to(features.dtype) for each in bias]
            kept = torch.where(labels == ignored, -100, labels)
            if (kept == -100).all():
                return (features.sum() + weight.sum()) * 0 * (torch.ones(len(labels)) if options["reduction"] == "none" else 1)
            return written_out(row, features, weight, kept, *given, reduction=options["reduction"])

    return _of_rows(ours), _of_rows(plain)


def _of_two_vectors(case, features, weight, labels, *, margin, reduction, **options):
    """Its softplus, exactly: PyTorch's own has no e^-20."""
    lse, cosine, *largest = cosine_lse(features, weight, labels, return_largest=case["largest"], **options)
    counted = labels != options["ignore_index"]
    if largest and case["inputs"] not in ("nan", "inf"):
        _assert_largest(case, features[counted], weight, labels[counted].long(), *(each[counted] for each in largest))
    losses = torch.where(counted, torch.logaddexp(lse - options["scale"] * (cosine - margin), lse.new_zeros(())), 0.0)
    return losses if reduction == "none" else losses.sum() / (max(1, int(counted.sum())) if reduction == "mean" else 1)


def _assert_largest(case, features, weight, labels, cosine, nearest):
    """Each row's largest cosine with another class, off by no more than the rounding of unit rows, and that class."""
    features, weight = features.detach().double(), weight.detach().double()
    unit = (torch.where(rows.norm(dim=1, keepdim=True) < 1e-12, 0.0, F.normalize(rows)) for rows in (features, weight))
    exact = torch.einsum("nd,cd->nc", *unit)
    exact = exact.scatter(1, labels[:, None], -torch.inf)
    wide = torch.finfo(product_dtype(case)).eps
    within = 2 * ((torch.finfo(torch.bfloat16).eps if is_low(case) else wide) + case["size"] * wide)
    assert ((cosine.double() - exact.amax(1)).abs() <= within).all(), "negative_cosine"
    assert (exact.gather(1, nearest[:, None])[:, 0] >= exact.amax(1) - 2 * within).all(), "negative_class"


def _of_a_head(stored, features, weight, labels, **options):
    if stored == "float8":
        head = CosFaceLoss(weight.shape[1], len(weight), table_format=stored, **options)
        kept = tables.fill(head.weight, head.weight_scale, weight)
        assert torch.equal(kept.nan_to_num(), weight.nan_to_num()), "rows are encoded otherwise"
        return head(features, labels)
    head = CosFaceLoss(weight.shape[1], len(weight), **options)
    return torch.func.functional_call(head, {"weight": weight}, (features, labels))


def _of_rows(function):
    """A mean or a sum as the first of N numbers."""

    def call(features, weight, labels):
        losses = function(features, weight, labels)
        return losses if losses.dim() else torch.cat([losses[None], losses.new_zeros(max(len(labels) - 1, 0))])[: len(labels)]

    return call


def _of_classes(plain, classes, ignored):
    """The loss over these rows of the table alone."""

    def call(features, weight, labels):
        places = torch.searchsorted(classes, labels.clamp(max=int(classes[-1])))
        return plain(features, weight[classes], torch.where(labels == ignored, ignored, places))

    return call


def _far_from_jumps(case, features, weight, labels):
    """(N,) which rows have no angle so near a jump of ψ, and no class with two centres so alike, that rounding decides."""
    row, distance = ROWS[case["margin"]], 0.1 if is_low(case) else 1e-3
    x, w = F.normalize(features.double()), F.normalize(weight.double())
    angles = (x[:, None] * w.unflatten(0, (-1, row.centers))[labels]).sum(2).clamp(-1, 1).acos()
    jumps = [[*row.jumps(norm)] or [torch.inf] for norm in features.double().norm(dim=1).tolist()]
    far = (angles[:, :, None] - torch.tensor(jumps, dtype=torch.float64)[:, None]).abs().amin((1, 2)) > distance
    if row.centers > 1:
        products = x @ (weight.double() if "weight" in row.raw else w).T
        nearest = products.unflatten(1, (-1, row.centers)).topk(2, dim=2).values
        far &= (nearest[..., 0] - nearest[..., 1]).amin(1) > 1e-5 * products.abs().amax(1)
    return far


def _least_number(dtype):
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _largest_exponent(case, features, weight):
    """As the rule of tests/cases.py wants it."""
    if case["margin"] in CALLS or not len(features):
        return case["scale"] or 64.0
    return steepness(ROWS[case["margin"]], features.double(), weight.double())


def _assert_right(case, scale, name, ours, exact, bound):
    low, output = is_low(case), ours.dtype
    if case["inputs"] in ("nan", "inf"):
        assert torch.equal(ours.isfinite(), exact.isfinite()), f"{name}: what is no number is elsewhere"
        ours, exact, bound = (torch.where(exact.isfinite(), tensor, 0.0) for tensor in (ours, exact, bound))
        bound = torch.where(bound.isfinite(), bound, exact.to(bound.dtype))
    wide = "float64" in (case["features"], case["weight"])
    products = product_dtype(case)
    # Of two exponents, s times a sum of D products each; where that is small, of a length, a quotient, a product, a projection.
    rounded = 0.0 if low else (scale * math.sqrt(case["size"]) + 4) * torch.finfo(products).eps / (1 if wide else 2)
    if case["margin"] == "cosine_lse":  # which returns an exponent, and another is taken from it: both are rounded
        rounded *= 3
    if case["margin"] not in CALLS and not low:  # ψ is of an angle, steep at its ends: as tests/test_margins.py allows
        rounded = tolerance(products, scale)
    if low:  # an exponent of s times the product of two unit rows, each of D numbers rounded to 16 bits: what few draws differ by
        rounded = math.expm1(min(scale * torch.finfo(torch.bfloat16).eps / 2 / math.sqrt(case["size"]), 700.0))
        if name == "loss":
            rounded *= math.sqrt(len(exact)) / (float(exact.norm()) or 1.0)
    if wide:  # of the same condition, with the digits of float64, for ours and for what it is compared with
        bound = exact + (bound.double() - exact) * 2.0**-28
    if wide and case["margin"] in ROWS and ROWS[case["margin"]].margin.needs_norm and name == "dX":
        rounded += torch.finfo(output).eps  # two gradients, by the product and by ‖x‖, each rounded to the features' dtype
    # The output's dtype has no number below its least.
    rounded += _least_number(output) / 2 * math.sqrt(exact.numel()) / max(float(exact.norm()), 1e-300)
    assert_as_accurate(name, ours, exact, bound.to(exact.dtype), luck=True, rounded=rounded)
