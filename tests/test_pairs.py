"""Is a list of pairs read as it was meant, and is a file that would do more than hold images refused before it does?"""

import io
import json
import pickle
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("yaml")

from PIL import Image

from cosface_kernels.tools import cli
from cosface_kernels.training import embed, evaluate, faces, pairs

ROOT = Path(__file__).parents[1]
SIZE = 16


def png(identity, image):
    pixels = faces.render([identity], [image], SIZE)[0].transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def network(monkeypatch):
    """A run whose network is the mean colour and a little of each pixel of the left half: mirror images differ."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Parameter(torch.randn(3 * SIZE * SIZE // 2, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return x[..., : SIZE // 2].flatten(1) @ self.mix

    network = Network()
    monkeypatch.setattr(
        "cosface_kernels.training.backbones.load_backbone", lambda run: (network, SimpleNamespace(image_size=SIZE))
    )
    monkeypatch.setattr(embed, "load_backbone", lambda run: (network, SimpleNamespace(image_size=SIZE)))
    return network


def write_bin(path, protocol=4, count=20):
    """`count` pairs, every other one of one identity, as encoded images."""
    same = [pair % 2 == 0 for pair in range(count)]
    images = [png(pair + (side and not same[pair]), 2 * pair + side) for pair in range(count) for side in (0, 1)]
    path.write_bytes(pickle.dumps((images, same), protocol=protocol))
    return images, same


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "arrays"])
def test_bin_files(tmp_path, protocol, kind):
    """As Python 2 and 3 write them, and forks with NumPy: cv2.imencode's columns of bytes, truth values in arrays."""
    encoded = [b"\x80abc", b"d" * 300, b"e", b"\x00"]
    images = encoded if kind == "bytes" else [np.frombuffer(image, np.uint8)[:, None].copy() for image in encoded]
    for same in ([True, False], [1, 0], list(np.array([True, False])), np.array([True, False])):
        (tmp_path / "p.bin").write_bytes(pickle.dumps((images, same), protocol=protocol))
        found = pairs.read(tmp_path / "p.bin")
        assert [template[0][1] for template in found.templates] == encoded
        assert (found.first.tolist(), found.second.tolist(), found.same.tolist()) == ([0, 2], [1, 3], [True, False])


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def many_bytes():
    """One text of 1000 characters made into bytes, again and again."""
    text = b"X\xe8\x03\x00\x00" + b"a" * 1000
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02(" + text + b"q\x00" + again * 100 + b"l."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(([b"a", b"b"], [Runs(exec, "raise SystemExit('it ran')")])), "it names builtins.exec, which is no image"),
        (pickle.dumps(([Runs(np.load, "x")], [True])), "which is no image and may run code"),
        (pickle.dumps(([b"a", b"b"], {True})), "has the operation EMPTY_SET"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "notes an object number"),
        (many_bytes(), "it makes more bytes than it has"),
        (pickle.dumps(([b"a", b"b", b"c"], [True])), "has 3 images for 1 pairs; each pair needs two"),
        (pickle.dumps(([], [])), "has 0 images for 0 pairs"),
        (pickle.dumps(([b"a", 3], [True])), "there is a int in place of an image"),
        (pickle.dumps(([b"a", b"b"], [2])), "there is '2' in place of whether"),
        (pickle.dumps(([np.zeros(3), b"b"], [True])), "in place of an image"),
        (pickle.dumps(([b"a", b"b"], [True]))[:-9], "damaged one"),
        (b"", "damaged one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bin_file_of_something_else(tmp_path, content, message):
    (tmp_path / "p.bin").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        pairs.read(tmp_path / "p.bin")
    assert str(tmp_path / "p.bin") in str(error.value)


def test_lists(tmp_path):
    """LFW's pairs.txt, and lines of two names, of which one is a folder of frames as in YTF."""
    for name in ("A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg", "frames/1.png", "frames/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "frames" / "notes.md").touch()
    (tmp_path / "lfw.txt").write_text("10\t300\nA\t1\t2\nA\t1\tB\t1\n")
    found = pairs.read(tmp_path / "lfw.txt")
    assert (found.first.tolist(), found.second.tolist(), found.same.tolist()) == ([0, 0], [1, 2], [True, False])
    (tmp_path / "ytf.txt").write_text("frames A/A_0002.jpg 0\n\nframes B/B_0001.jpg 1\n")
    found = pairs.read(tmp_path / "ytf.txt")
    assert [len(template) for template in found.templates] == [2, 1, 1] and found.same.tolist() == [False, True]
    (tmp_path / "empty").mkdir()
    for line, message in (
        ("A 1 9", "line 1 names .*A_0009.jpg, and there is no such file"),
        ("A/A_0001.jpg empty 1", "names .*empty, a folder with no .jpg"),
        ("A/A_0001.jpg B/B_0001.jpg yes", "line 1 must be 'image image 0-or-1'"),
        ("A 1", "line 1 must be"),
        ("", "has no pairs"),
    ):
        (tmp_path / "p.txt").write_text(line)
        with pytest.raises(ValueError, match=message):
            pairs.read(tmp_path / "p.txt")


def test_template_is_the_mean_of_unit_rows():
    rows = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0], [0.0, -2.0]])
    listed = pairs.Pairs([[1, 2], [3], [4]], np.array([0, 0]), np.array([1, 2]), np.array([True, False]))
    assert evaluate.scores_of(listed, rows) == pytest.approx([1.0, -(0.5**0.5)])


@pytest.mark.parametrize("flip", ["none", "concat", "sum"])
def test_flip(network, flip):
    images = torch.randn(5, 3, SIZE, SIZE)
    plain, mirrored = network(images), network(images.flip(3))
    expected = {"none": plain, "concat": torch.cat([plain, mirrored], 1), "sum": plain + mirrored}[flip]
    assert torch.equal(embed.flipped(network, images, flip), expected)


def test_command(tmp_path, network, capsys):
    images, same = write_bin(tmp_path / "p.bin")
    command = ["eval", "--pairs", str(tmp_path / "p.bin"), "--checkpoint", "run", "--json", str(tmp_path / "o.json")]
    assert cli.main(command) == 0
    record = json.loads((tmp_path / "o.json").read_text())
    verified = record["verification"]
    assert (record["flip"], verified["pairs"]) == ("concat", {"genuine": 10, "impostor": 10})
    assert len(verified["folds"]["accuracies"]) == 10 and f"{verified['accuracy']:.2%}" in capsys.readouterr().out
    with torch.no_grad():
        x = torch.stack([embed.prepare(embed.decode(image, SIZE)) for image in images])
        rows = torch.nn.functional.normalize(embed.flipped(network, x, "concat").double())
    scores = (rows[::2] * rows[1::2]).sum(1)
    genuine, impostors = scores[same], scores[~torch.tensor(same)]
    assert verified["tar"]["1e-1"] == (genuine > impostors.sort().values[-2]).double().mean()
    write_bin(tmp_path / "p.bin", count=9)
    assert cli.main(command) == 1 and "10 folds need at least 10 pairs, got 9" in capsys.readouterr().err
    (tmp_path / "p.bin").write_bytes(pickle.dumps(([*images[:3], b"no image"] * 10, same), protocol=4))
    assert cli.main(command) == 1
    assert "p.bin, image 3 of pair 1: cannot be read as an image (ValueError: its 8 bytes are no image" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    for identity in range(3):
        (tmp_path / "crops" / f"id{identity}").mkdir(parents=True)
        for image in range(4):
            (tmp_path / "crops" / f"id{identity}" / f"{image}.png").write_bytes(png(identity, image))
    return tmp_path


def test_embed(folder, network, capsys):
    from safetensors.numpy import load_file

    command = ["embed", str(folder / "crops"), "--checkpoint", "run", "--flip", "none", "--out"]
    assert cli.main([*command, str(folder / "e.npy")]) == 0
    rows, labels = np.load(folder / "e.npy"), np.load(folder / "e.labels.npy")
    assert labels.tolist() == [f"id{identity}" for identity in range(3) for _ in range(4)]
    assert (folder / "e.names.txt").read_text().splitlines()[5] == "id1/1.png"
    with torch.no_grad():
        expected = network(embed.prepare(torch.from_numpy(faces.render([1], [1], SIZE))))
    np.testing.assert_allclose(rows[5], expected[0], rtol=1e-5)
    assert cli.main([*command, str(folder / "e.safetensors")]) == 0
    found = load_file(folder / "e.safetensors")
    assert (found["embeddings"] == rows).all() and found["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    arrays = [str(folder / "e.safetensors")] * 2
    assert cli.main(["eval", "--embeddings", arrays[0], "--labels", arrays[1]]) == 0
    before = sorted(path.name for path in folder.iterdir())
    (folder / "crops" / "id1" / "bad.png").write_bytes(b"")
    capsys.readouterr()
    assert (
        cli.main([*command, str(folder / "new.npy")]) == 1
        and "id1/bad.png: cannot be read as an image" in capsys.readouterr().err
    )
    network.mix.data.fill_(torch.nan)
    (folder / "crops" / "id1" / "bad.png").unlink()
    assert cli.main([*command, str(folder / "new.npy")]) == 1 and "id0/0.png: the network gives it" in capsys.readouterr().err
    assert cli.main(["embed", str(folder / "none"), *command[2:], "e.npy"]) == 1
    assert "none: there is no such folder" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [
        "eval",
        "eval --embeddings e.npy",
        "eval --embeddings e.npy --labels y.npy --pairs p.bin",
        "eval --pairs p.bin",
        "eval --embeddings e.npy --labels y.npy --flip sum",
        "embed crops --out e.npy",
        "embed crops --checkpoint run",
        "embed --checkpoint run",
    ],
)
def test_wrong_usage(command):
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(command))
    assert stop.value.code == 2


@pytest.mark.slow
def test_onnx_is_the_network(tmp_path, monkeypatch):
    """In onnxruntime, for another number of images than it was exported with: within the rounding of float32 sums."""
    runtime, _ = (
        pytest.importorskip("onnxruntime", reason="extras [onnx]"),
        pytest.importorskip("onnxscript", reason="extras [onnx]"),
    )
    from cosface_kernels.training import backbones

    torch.manual_seed(0)
    network = backbones.build("small", 16, SIZE).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    monkeypatch.setattr(embed, "load_backbone", lambda run: (network, SimpleNamespace(image_size=SIZE)))
    assert cli.main(["embed", "--checkpoint", "run", "--onnx", str(tmp_path / "n.onnx")]) == 0
    images = faces.render(np.arange(5), np.arange(5), SIZE)
    session = runtime.InferenceSession(str(tmp_path / "n.onnx"))
    (got,) = session.run(["embedding"], {"data": images.astype(np.float32)})
    with torch.no_grad():
        exact = torch.nn.functional.normalize(network.double()(images_in_float64(images)))
        plain = torch.nn.functional.normalize(network.float()(embed.prepare(torch.from_numpy(images))))
    error = abs(torch.from_numpy(got) - exact).max()
    assert error <= 3 * abs(plain - exact).max() + torch.finfo(torch.float32).eps


def images_in_float64(images):
    return torch.from_numpy(images).double() / 127.5 - 1


@pytest.mark.slow
def test_commands_of_the_document(folder, monkeypatch):
    """All of docs/evaluation.md, with a network that was trained for a step."""
    pytest.importorskip("onnxscript", reason="extras [onnx]")
    document = (ROOT / "docs/evaluation.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    (cosface .*)$", document, re.M)
    monkeypatch.chdir(folder)
    options = [f"image_size={SIZE}", "batch_size=8", "embedding_size=8", "workers=0"]
    assert cli.main(["train", "data=crops", "out=runs/first", "epochs=1", *options]) == 0
    random = np.random.default_rng(0)
    np.save("embeddings.npy", random.normal(size=(30, 8))), np.save("labels.npy", np.arange(30) // 3)
    np.save("distractors.npy", random.normal(size=(9, 8)))
    write_bin(folder / "lfw.bin")
    lines = [f"id{pair % 3}/0.png id{(pair + pair % 2) % 3}/1.png {1 - pair % 2}" for pair in range(12)]
    (folder / "pairs.txt").write_text("\n".join(lines))
    np.save("ijbc.npy", random.normal(size=(6, 8)))
    Path("ijbc_face_tid_mid.txt").write_text("".join(f"{row}.jpg {row} 1\n" for row in range(6)))
    Path("ijbc_template_pair_label.txt").write_text("0 1 1\n2 3 0\n4 5 0\n")
    for name, templates in (("gallery_G1", (0, 1)), ("gallery_G2", (2, 3)), ("probe_mixed", (4, 5))):
        lines = "".join(f"{template},{template % 2 + 2 * (template == 2)}\n" for template in templates)
        Path(f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + lines)
    assert len(commands) == 9
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    assert json.loads((folder / "result.json").read_text()).keys() >= {"verification", "identification"}
    assert json.loads((folder / "lfw.json").read_text())["pairs"]["images"] == 40
    assert (folder / "network.onnx").stat().st_size > 1000
