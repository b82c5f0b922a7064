"""Comparison with the float64 reference, within what rounding can explain."""

from functools import partial

import torch
from cases import evaluate, make

from cosface_kernels import cosface_loss, reference

SIZE, NUM_CLASSES = 16, 300  # three slabs of 128 under the fixture small_slabs, the last one short


def draw(device, dtype=torch.float64, num_rows=7, num_classes=NUM_CLASSES):
    features, weight, labels = make("uniform", num_rows, num_classes, SIZE)
    return features.to(device, dtype), weight.to(device, dtype), labels.to(device)


def tolerance(product_dtype, scale=64.0, size=SIZE):
    """Relative error that rounding explains. A cosine of unit rows of `size` elements in `product_dtype`, summed wide, is off by
    at most 2 u + size e (Cauchy-Schwarz), an exponential by `scale` times that and its own rounding u; a loss or a gradient is
    made of two such terms, and a gradient's projection subtracts two of them again."""
    wide = torch.finfo(torch.promote_types(product_dtype, torch.float32)).eps
    rounding = torch.finfo(product_dtype).eps / 2
    relative = 4 * (scale * (2 * rounding + size * wide) + rounding)
    assert relative < 0.1, "rounding would explain a wrong result: test at a smaller scale"
    return relative


def assert_close(ours, exact, relative, what="result", size=0.0):
    """‖ours - exact‖ <= relative ‖exact‖ (or ‖terms that may have cancelled‖, `size`), plus one rounding of what is returned."""
    error = (ours.double() - exact).norm()
    allowed = relative * max(exact.norm(), size) + torch.finfo(ours.dtype).eps * exact.norm()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def assert_equals_reference(
    features, weight, labels, upstream=None, product_dtype=None, scale=64.0, cancels=False, backend="auto", **options
):
    """Loss, dX and dW of cosface_loss, against the reference in float64. cancels: dX is a difference of equal vectors."""
    if upstream is None:
        shape = labels.shape if options.get("reduction") == "none" else ()
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(features.device)
    options["scale"] = scale
    ours = evaluate(partial(cosface_loss, backend=backend, **options), features, weight, labels, upstream)
    exact = evaluate(partial(reference.cosface_loss, **options), features.double(), weight.double(), labels, upstream)
    relative = tolerance(product_dtype or features.dtype, scale)
    # s / ‖x‖ times a difference of two vectors no longer than 1.
    terms = scale * (upstream / features.double().norm(dim=1)).norm() if cancels else 0.0
    for what, tensor, wanted, size in zip(("loss", "dX", "dW"), ours, exact, (0.0, terms, 0.0), strict=True):
        assert tensor.shape == wanted.shape
        assert_close(tensor, wanted, relative, what, size)
    return ours
