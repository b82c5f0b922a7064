"""`cosface embed`: the embeddings of images, and the network as an ONNX file.

flip "none"     f(x)
flip "concat"   (f(x), f(mirrored x)), 2 D numbers, as the paper
flip "sum"      f(x) + f(mirrored x), as InsightFace
"""

import logging
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .arrays import write_text, written
from .backbones import load_backbone
from .data import prepare
from .files import IMAGES, decode

BATCH = 128
OPSET = 18


def embed(backbone, images, size, flip):
    """float32 (N, D or 2 D), not unit rows, of [(name, encoded image or its path)].

    Raises:
        ValueError: an image cannot be read, or has no embedding of finite numbers; the message has its name.
    """
    device, rows = next(backbone.parameters()).device, []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            features = flipped(backbone, prepare(torch.stack([_decoded(*image, size) for image in some]).to(device)), flip).cpu()
            wrong = ~(features.isfinite().all(1) & features.any(1))
            if wrong.any():
                name = some[int(wrong.int().argmax())][0]
                raise ValueError(f"{name}: the network gives it an embedding that is not finite, or of length 0")
            rows.append(features)
    return torch.cat(rows)


def flipped(backbone, batch, flip):
    """float32 (N, D or 2 D) of a backbone's input, by the rule `flip`."""
    features = backbone(batch).float()
    if flip == "none":
        return features
    mirrored = backbone(batch.flip(3)).float()
    return features + mirrored if flip == "sum" else torch.cat([features, mirrored], 1)


def _decoded(name, data, size):
    try:
        return decode(data.read_bytes() if isinstance(data, Path) else data, size)
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ValueError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from error


def folder(path, checkpoint, out, flip):
    """Write the embeddings of all images below a folder; return one line that says what was written.

    out: E.npy, beside which come E.labels.npy, the folder of each image, and E.names.txt; or E.safetensors, its `labels` the
    numbers of the sorted folders, and E.names.txt.

    Raises:
        ValueError: there are no images, or one cannot be read. Nothing was written.
    """
    path, out = Path(path), Path(out)
    if out.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"--out must be a .npy or a .safetensors file, got {out}")
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGES and each.is_file())
    if not files:
        raise ValueError(f"{path}: has no {', '.join(IMAGES)} files, in no folder of it")
    backbone, config = load_backbone(checkpoint)
    rows = embed(backbone, [(file, file) for file in files], config.image_size, flip)
    labels = np.array([file.relative_to(path).parent.as_posix() for file in files])
    _write(out, rows, labels)
    write_text(out.with_suffix(".names.txt"), "".join(f"{each.relative_to(path).as_posix()}\n" for each in files))
    return f"wrote {out}: {len(rows):,} embeddings of D = {rows.shape[1]}, of images in {len(set(labels)):,} folders"


def _write(out, rows, labels):
    if out.suffix == ".npy":
        for path, array in ((out.with_suffix(".labels.npy"), labels), (out, rows.numpy())):
            with written(path) as file:
                np.save(file, array)
        return
    from safetensors.torch import save

    numbers = torch.from_numpy(np.unique(labels, return_inverse=True)[1].ravel())
    with written(out) as file:
        file.write(save({"embeddings": rows, "labels": numbers}))


class Exported(nn.Module):
    """Pixels to unit embeddings: the ONNX file's function."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, data):
        return F.normalize(self.backbone(prepare(data)))


def onnx(checkpoint, out):
    """Write the network as ONNX: `data`, float32 RGB pixels 0 to 255 of shape (N, 3, S, S), to `embedding`, unit rows (N, D).

    Raises:
        ValueError: onnx or onnxscript is missing, or the network cannot be exported.
    """
    out = Path(out)
    for name in ("onnx", "onnxscript"):
        if not find_spec(name):
            raise ValueError(f'ONNX needs {name}, which is not installed: pip install "cosface-kernels[onnx]"')
    backbone, config = load_backbone(checkpoint)
    size = config.image_size
    names = {"input_names": ["data"], "output_names": ["embedding"], "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    with _quiet():
        module, example = Exported(backbone).eval(), (torch.zeros(2, 3, size, size, dtype=torch.float32, device="cpu"),)
        program = torch.onnx.export(module, example, dynamo=True, opset_version=OPSET, verbose=False, **names)
    with written(out) as file:
        file.write(program.model_proto.SerializeToString())
    return f"wrote {out}: data (N, 3, {size}, {size}), RGB pixels 0 to 255, to embedding (N, D), unit rows"


@contextmanager
def _quiet():
    """Context manager without warnings of the exporter's, which names operators of torchvision that it does without."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
