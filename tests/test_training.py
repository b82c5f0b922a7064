"""Does `cosface train` train, stop and go on as it says, and refuse what it cannot read by name?"""

import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("yaml")
pytest.importorskip("tqdm")

from PIL import Image
from test_training_records import image, write_rec, write_tar

from cosface_kernels import theory
from cosface_kernels.tools import cli
from cosface_kernels.training import backbones, config, data, faces, log, loop, model

SMALL = (
    "data=faces:2:4",
    "image_size=16",
    "batch_size=4",
    "embedding_size=8",
    "backbone=sphere4",
    "workers=0",
    "tensorboard=false",
    "held_out=2",
)


MISSING = [("yaml", "some.yaml", 1, '"cosface-kernels[train]"'), ("timm", "backbone=timm:vit_tiny", 2, "timm")]


def settings(out, *more):
    return config.of_command([*SMALL, f"out={out}", *more], False)


def lines(run):
    """What does not depend on time."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "lr", "loss", "target_cosine", "negative_cosine", "top1")} for line in found]


def losses(run):
    return [line["loss"] for line in lines(run)]


def test_settings_come_from_files_and_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nepochs: 7\nclip: null\nflip: false\nmilestones: [0.1, 0.2]\n")
    found = config.parse([str(tmp_path / "a.yaml"), "epochs=9", "data=digits", "out=x"])
    assert (found.lr, found.epochs, found.clip, found.flip, found.milestones) == (1e-3, 9, None, False, [0.1, 0.2])
    (tmp_path / "b.yaml").write_text(config.text(found))
    assert config.parse([str(tmp_path / "b.yaml")]) == found


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("epoch=1", "did you mean epochs?"),
        ("epochs=ten", "epochs must be a whole number from 1, got 'ten'"),
        ("epochs=1.5", "epochs must be a whole number"),
        ("lr=nan", "lr must be a number"),
        ("lr=inf", "lr must be a number"),
        ("seed=1e99", "seed must be a whole number from 0 to 2,147,483,648"),
        ("clip=0", "clip must be a number from 1e-09"),
        ("ema=1", "ema must be a number from 0 to 0.999999"),
        pytest.param(
            "device=cuda", "PyTorch finds no GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
        ("flip=maybe", "flip must be true or false"),
        ("optimizer=adam", "optimizer must be one of sgd, adamw"),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
        ("margin=ArcFace(m=9)", "m of ArcFace must be from 0"),
        ("margin=print(1)", "margin must be one of AdaFace, ArcFace"),
        ("margin=CosFace(nan)", "its arguments must be plain numbers"),
        ("margin=SphereFace() margin_warmup=0.5", "margin_warmup needs CosFace, ArcFace or AdaFace"),
        ("backbone=smal", "backbone must be one of small"),
        ("backbone=nowhere:net", "cannot be imported"),
        ("backbone=:", "cannot be imported"),
        ("backbone=os:getcwd", "backbone=os:getcwd fails, called with embedding_size=8"),
        ("backbone=torch.nn:Identity", "backbone=torch.nn:Identity makes (2, 3, 16, 16) of two images, and (2, 8) is wanted"),
        ("data=faces:many", "data=faces:many must be faces:IDENTITIES"),
        ("data=nowhere", "data: nowhere is not there"),
        (f"data={__file__}", "test_training.py is a file of another kind"),
        ("data=faces:10000000000000", "identities need a class table of 320,000.0 GB"),
        ("data=faces:10000000000000 table_format=float8", "identities need a class table of 80,000.0 GB"),
        ("batch_size=100", "fewer than batch_size=100"),
        ("accumulate=3", "must be a multiple of accumulate=3"),
        ("data=faces:1:8", "data: faces:1:8 has one identity"),
        ("batch_size=4 accumulate=4 backbone=small", "batch_size=4 gives small one image at a time"),
        ("fused=false table_format=bfloat16", "need fused=true"),
        ("fused=false sample_rate=0.5", "table_format, state_format and sample_rate need fused=true"),
        ("out=", "out is missing"),
        ("--print", "--print is no option"),
    ],
)
def test_wrong_settings_are_named_and_leave_no_folder(tmp_path, capsys, argument, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SMALL, f"out={tmp_path / 'run'}", *argument.split(" ")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_image_is_a_function_of_its_numbers():
    both = faces.render([5, 9, 5], [0, 3, 1], size=16, seed=1)
    assert both.shape == (3, 3, 16, 16) and both.dtype == np.uint8
    assert (faces.render([9], [3], size=16, seed=1)[0] == both[1]).all()
    others = [faces.render([9], [3], size=16, seed=2)[0], both[0], both[2]]
    assert all((other != both[1]).mean() > 0.5 for other in others)
    assert both.reshape(3, -1).std(1).min() > 10


def test_identities_differ_more_than_images():
    """The mean of many images, which loses pose and light, is nearer to that of others of the identity than to the rest."""
    identities, images = np.repeat(np.arange(6), 128), np.tile(np.arange(128), 6)
    means = faces.render(identities, images, size=16).reshape(6, 2, 64, -1).mean(2)
    distances = np.linalg.norm(means[:, None, 0] - means[None, :, 1], axis=2)
    assert distances.diagonal().mean() < 0.6 * distances.mean()


def test_order_is_the_same_on_any_number_of_processes():
    class Ranks:
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    options = config.Config(batch_size=8, accumulate=2, seed=3)
    whole = [piece.tolist() for _, piece in data.order(20, options, Ranks(0, 1), 0, 5)]
    parts = [[piece.tolist() for _, piece in data.order(20, options, Ranks(rank, 2), 0, 5)] for rank in range(2)]
    assert whole == [[*first, *second] for first, second in zip(*parts, strict=True)]
    resumed = [piece.tolist() for _, piece in data.order(20, options, Ranks(0, 1), 3, 5)]
    assert whole[6:] == resumed
    assert len({*whole[0], *whole[1], *whole[2], *whole[3]}) == 16 and whole[0] != whole[4]


def test_a_run_stops_and_goes_on_with_the_same_numbers(tmp_path, capsys):
    """With everything that has a state: momentum, table in 16 bits, augmentation, pieces, EMA, a moving margin."""
    options = [
        "epochs=2",
        "table_format=bfloat16",
        "accumulate=2",
        "ema=0.9",
        "crop=0.2",
        "downscale=0.5",
        "margin_warmup=0.5",
        "clip=5",
    ]
    assert loop.train(settings(tmp_path / "whole", *options)) == 0

    class Stops(loop._Signals):
        """SIGTERM after the first step."""

        asked = 0

        @property
        def got(self):
            self.asked += 1
            return signal.SIGTERM if self.asked > 1 else 0

        @got.setter
        def got(self, value):
            pass

    part = tmp_path / "part"
    assert loop.Run(settings(part, *options), False).train(Stops()) == 128 + signal.SIGTERM
    assert f"cosface train --resume out={part} goes on" in capsys.readouterr().out and len(losses(part)) == 1
    assert cli.main(["train", "--resume", f"out={part}", "workers=0"]) == 0
    assert lines(part) == lines(tmp_path / "whole") and len({*losses(part)}) == 4
    whole, found = (backbones.load_backbone(run)[0].state_dict() for run in (tmp_path / "whole", part))
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert (part / "report.html").exists()
    rates = json.loads((part / "held_out.json").read_text())
    assert rates == json.loads((tmp_path / "whole/held_out.json").read_text())
    assert rates["verification"]["pairs"] == {"genuine": 2 * 6, "impostor": 4 * 4}


def test_a_run_is_not_trained_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(config.ConfigError, match="no run and not empty"):
        loop.train(settings(tmp_path))
    (tmp_path / "file").rename(tmp_path / "config.yaml")
    with pytest.raises(config.ConfigError, match="has a run already: --resume"):
        loop.train(settings(tmp_path))
    (tmp_path / "config.yaml").write_text(config.text(settings(tmp_path)))
    with pytest.raises(config.ConfigError, match=r"nowhere is no run, it has no config\.yaml"):
        config.of_command(["out=nowhere"], True)
    with pytest.raises(config.ConfigError, match="is no run and not empty"):
        loop.train(settings(__file__))
    with pytest.raises(config.ConfigError, match="lr cannot change with --resume"):
        config.of_command([f"out={tmp_path}", "lr=0.2"], True)


def folder_of_images(path):
    for identity, count in (("ann", 3), ("bob", 3), ("eve", 1), ("nobody", 0)):
        (path / identity).mkdir(parents=True)
        for number in range(count):
            pixels = faces.render([len(identity)], [number], 20)[0].transpose(1, 2, 0)
            Image.fromarray(pixels).save(path / identity / f"{number}.png")


def test_a_folder_of_images(tmp_path, capsys):
    folder_of_images(tmp_path / "crops")
    (tmp_path / "crops/bob/1.png").write_bytes((tmp_path / "crops/bob/1.png").read_bytes()[:3])
    assert loop.train(settings(tmp_path / "run", f"data={tmp_path / 'crops'}", "batch_size=7", "epochs=2")) == 0
    assert f"1 of 3 identities have one image, such as {tmp_path / 'crops/eve'}" in capsys.readouterr().out
    (line,) = (tmp_path / "run/damaged.txt").read_text().splitlines()
    assert "bob/1.png" in line
    with pytest.raises(RuntimeError, match=r"1 damaged images, more than max_damaged=0; the last is .*bob/1\.png"):
        loop.train(settings(tmp_path / "other", f"data={tmp_path / 'crops'}", "batch_size=7", "max_damaged=0"))
    alone = settings(tmp_path / "alone", f"data={tmp_path / 'crops'}", "batch_size=2", "epochs=9", "backbone=small")
    with pytest.raises(RuntimeError, match=r"one image is left of a batch.*alone/damaged\.txt names the others"):
        loop.train(alone)
    (tmp_path / "crops/ann/9.png").write_bytes(b"none")
    with pytest.raises(config.ConfigError, match=r"has 8 images of 3 identities now, and the run in .*run began with 7 of 3"):
        loop.train(config.of_command([f"out={tmp_path / 'run'}"], True), resume=True)
    for path in (tmp_path / "crops").glob("*/*.png"):
        path.write_bytes(b"none")
    more = f"data={tmp_path / 'crops'}", "batch_size=2"
    with pytest.raises(RuntimeError, match=r"no image of a batch can be read, such as .*4 bytes are no image that Pillow knows"):
        loop.train(settings(tmp_path / "other3", *more))
    with pytest.raises(config.ConfigError, match="run has no images"):
        loop.train(settings(tmp_path / "other2", f"data={tmp_path / 'run'}"))


def test_damaged_images_are_counted_over_all_processes(tmp_path):
    ranks = [SimpleNamespace(rank=rank) for rank in range(2)]
    first, second = (log.Log(tmp_path, 0, each, config.Config(tensorboard=False)) for each in ranks)
    first.damaged({3: ("a.png", "why")}, 1)
    second.damaged({3: ("a.png", "why")}, 1)
    assert (tmp_path / "damaged.txt").read_text() == "a.png: why\n"
    with pytest.raises(RuntimeError, match=r"2 damaged images, more than max_damaged=1; the last is b\.png"):
        second.damaged({4: ("b.png", "why")}, 1)


def test_pieces_of_a_batch_give_the_step_of_the_batch(tmp_path):
    """With a network that has no batch statistics; the rate is such that rounding is not blown up by the steps that follow."""
    curves = []
    for pieces in (1, 2):
        run = tmp_path / str(pieces)
        assert loop.train(settings(run, "epochs=2", "crop=0.2", "lr=1e-3", f"accumulate={pieces}")) == 0
        curves.append(losses(run))
    assert len({*curves[0]}) == 4 and curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_one_step_is_clipped_and_eval_takes_the_mean_of_the_weights(tmp_path):
    one_step = ["epochs=1", "batch_size=8", "lr=1", "warmup=0", "momentum=0", "weight_decay=0", "schedule=constant"]
    run = loop.Run(settings(tmp_path, *one_step, "clip=0.01", "ema=0.75"), False)
    start = [each.clone() for each in run.model.backbone.parameters()]
    with loop._Signals() as signals:
        assert run.train(signals) == 0
    assert re.fullmatch(r"loss [\d.]+, lr 1, \d+ images/s, [\d.]+ GB", run.log.bar.postfix)
    steps = [end.detach() - each for each, end in zip(start, run.model.backbone.parameters(), strict=True)]
    assert torch.cat([each.flatten() for each in steps]).norm().item() == pytest.approx(0.01, rel=1e-3)
    means = backbones.load_backbone(tmp_path)[0].parameters()
    for each, step, mean in zip(start, steps, means, strict=True):
        torch.testing.assert_close(mean, each + 0.25 * step)


def test_a_checkpoint_of_something_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "import torch\ndef net(embedding_size, image_size):\n    return torch.nn.Sequential(torch.nn.Flatten(), "
    layer = "torch.nn.Linear(768, embedding_size)"
    for name, layers in (("first", f"{layer})"), ("second", f"{layer}, torch.nn.PReLU())")):
        (tmp_path / f"{name}.py").write_text(code + layers)
    assert loop.train(settings(tmp_path / "run", "backbone=first:net", "epochs=1")) == 0
    resumed = config.of_command([f"out={tmp_path / 'run'}"], True)
    with pytest.raises(config.ConfigError, match=r"(?s)the backbone is not that of the run's checkpoint: .*backbone\.2\.weight"):
        loop.train(dataclasses.replace(resumed, backbone="second:net"), resume=True)
    (tmp_path / "run/checkpoints/step-2/manifest.json").write_bytes(b"\xff")
    with pytest.raises(RuntimeError, match=r"is damaged: UnicodeDecodeError: .*; without .*step-2 --resume goes on"):
        loop.train(resumed, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert cli.main(["train", *SMALL, f"out={tmp_path / 'run'}", "lr=1e30", "warmup=0", "epochs=2"]) == 1
    assert "the loss of step 2 is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_augmentation_moves_whole_images():
    images = torch.from_numpy(faces.render(range(3), range(3), 16))
    options = config.Config(flip=True, crop=0.25, downscale=1.0)
    still = np.full((4, 3), 0.5)
    still[0], still[3] = 0.9, 1.0
    assert torch.equal(data.augment(images, options, still), images)
    mirrored, moved, small = still.copy(), still.copy(), still.copy()
    mirrored[0, 1], moved[2, 0], small[3, 2] = 0.0, 1.0, 0.7
    assert torch.equal(data.augment(images, options, mirrored)[1], images[1].flip(2))
    found = data.augment(images, options, moved)
    assert torch.equal(found[0, :, :-4], images[0, :, 4:]) and torch.equal(found[1:], images[1:])
    found = data.augment(images, options, small)
    assert torch.equal(found[:2], images[:2]) and found[2].float().std() < images[2].float().std()


def test_learning_rate_and_margin():
    options = config.Config(lr=1.0, warmup=0.2, margin_warmup=0.5)
    rates = [model.learning_rate(options, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates == rates[:2] + sorted(rates[2:], reverse=True) and rates[-1] < 0.05
    options.schedule, options.warmup = "step", 0.0
    assert [model.learning_rate(options, step, 10) for step in (0, 5, 8, 9)] == pytest.approx([1, 0.1, 0.01, 0.001])
    options.schedule = "poly"
    assert [model.learning_rate(options, step, 10) for step in (0, 5, 8)] == pytest.approx([1, 0.25, 0.04])
    options.schedule = "constant"
    assert {model.learning_rate(options, step, 10) for step in range(10)} == {1}
    margin = model.margin_of("ArcFace(0.5, easy_margin=True)")
    assert [model.margin_at(options, margin, step, 10).m for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 0.5])


@pytest.mark.parametrize(("name", "size"), [("small", 16), ("small", 56), ("sphere20", 16), ("iresnet18", 16)])
def test_backbones(name, size):
    net = backbones.build(name, 5, size)
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_load_backbone_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
        backbones.load_backbone(tmp_path)
    (tmp_path / "config.yaml").write_text(config.text(settings(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"), warnings.catch_warnings():
        backbones.load_backbone(tmp_path)


def test_iresnet_has_the_names_of_insightface():
    """Those of iresnet18 in arcface_torch, by which published weights load."""
    with torch.device("meta"):
        names = backbones.build("iresnet18", 512, 112).state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wanted = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"}
    wanted |= {f"{each}.{name}" for each in ("bn1", "bn2", "features") for name in norm}
    for layer in range(1, 5):
        for block in range(2):
            at = f"layer{layer}.{block}"
            wanted |= {f"{at}.conv1.weight", f"{at}.conv2.weight", f"{at}.prelu.weight"}
            wanted |= {f"{at}.bn{number}.{name}" for number in (1, 2, 3) for name in norm}
        wanted |= {f"layer{layer}.0.downsample.0.weight", *(f"layer{layer}.0.downsample.1.{name}" for name in norm)}
    assert names.keys() == wanted
    assert names["fc.weight"].shape == (512, 512 * 7 * 7) and names["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert sum(backbones.IRESNET["iresnet100"]) == 49  # of two convolutions each; with the first one and fc 100 layers


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net(embedding_size, image_size):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, embedding_size))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["backbone=mine:net", "precision=bfloat16", "optimizer=adamw", "lr=1e-3", "fused=false", "schedule=poly"]
    assert loop.train(settings(tmp_path / "run", *options, "epochs=4")) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert isinstance(backbones.load_backbone(tmp_path / "run")[0][1], torch.nn.Linear)


def test_networks_of_timm(monkeypatch):
    """As timm.create_model calls them: some take img_size, some do not, some want larger images; a name may be unknown."""

    def create_model(name, num_classes, **options):
        if name == "unknown" or (name == "any_size" and options):
            raise (RuntimeError if name == "unknown" else TypeError)(f"{name}: {options}")
        pixels = options.get("img_size", 16) if name != "large" else 224
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * pixels**2, num_classes))

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    for name in ("of_a_size", "any_size"):
        net = backbones.build(f"timm:{name}", 5, 16)
        assert net.training and net(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(config.ConfigError, match="backbone=timm:large fails, called with embedding_size=5 and image_size=16"):
        backbones.build("timm:large", 5, 16)
    with pytest.raises(config.ConfigError, match=r"backbone=timm:unknown cannot be made: .*timm\.list_models"):
        backbones.build("timm:unknown", 5, 16)


@pytest.mark.parametrize(("module", "argument", "status", "remedy"), MISSING)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys, module, argument, status, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "some.yaml").write_text("epochs: 1")
    monkeypatch.chdir(tmp_path)
    try:
        found = cli.main(["train", *SMALL, "out=run", argument])
    except SystemExit as stop:
        found = stop.code
    assert found == status and f"which is not installed: pip install {remedy}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Dying(data.Faces):
    """A worker that is killed over image 3."""

    def batch(self, indices):
        if torch.utils.data.get_worker_info() and 3 in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_dies_is_said(tmp_path, monkeypatch, capsys, busy):
    monkeypatch.setattr(data, "Faces", Dying)
    step = loop.Run._step
    # PyTorch hears of the death by a signal, and raises wherever the main process is.
    monkeypatch.setattr(loop.Run, "_step", lambda *arguments: (step(*arguments), busy and time.sleep(30)))
    command = ["train", *SMALL, f"out={tmp_path / 'run'}"]
    assert cli.main([*command, "workers=1", "epochs=9"]) == 1
    error = capsys.readouterr().err
    assert "a worker that reads images died" in error and f"--resume out={tmp_path / 'run'} workers=0`" in error


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, capsys):
    """The second checkpoint does not fit; the first is gone on from."""
    options = [*SMALL, f"out={tmp_path / 'run'}", "epochs=3", "checkpoint_every=2"]
    write = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: full() if [*(tmp_path / "run/checkpoints").glob("step-4*")] else write(file))

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert cli.main(["train", *options]) == 1
    error = capsys.readouterr().err
    assert "step-4 was not saved, earlier ones are as they were" in error and "run is full" in error
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    monkeypatch.setattr(os, "fsync", write)
    assert cli.main(["train", "--resume", f"out={tmp_path / 'run'}"]) == 0 and len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_the_commands_of_the_document(tmp_path, monkeypatch, capsys):
    """docs/faces.md, from top to bottom in one folder, with small settings in place of the defaults; README.md has its first.

    That of torchrun in this process alone.
    """
    document, readme = (
        [
            shlex.split(command, comments=True)
            for command in re.findall(
                r"^    (?:torchrun .* --no-python )?(cosface .*)", (Path(__file__).parents[1] / name).read_text(), re.M
            )
        ]
        for name in ("docs/faces.md", "README.md")
    )
    assert ["cosface", "train", "data=train.rec", "out=runs/eight"] in document
    assert len(document) >= 10 and [line for line in readme if line[1] in ("train", "compare")] == document[:3]
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "crops"), folder_of_images(tmp_path / "others")
    (tmp_path / "shards").mkdir()
    write_rec(tmp_path)
    labels = [(f"{number}.cls", b"%d" % number) for number in range(4)]
    write_tar(tmp_path / "shards/0.tar", [*labels, *((f"{number}.png", image(number)[0]) for number in range(4))])
    small = ["image_size=16", "batch_size=4", "embedding_size=8", "workers=0", "tensorboard=false", "held_out=2", "epochs=1"]
    for _, name, *arguments in document:
        if name == "train":
            arguments = [each.replace("faces:200", "faces:4:3").replace("iresnet50", "sphere4") for each in arguments]
            arguments += [] if "--resume" in arguments else small
        assert cli.main([name, *arguments]) == 0, (name, arguments, capsys.readouterr().err)
    assert "others: TAR at FAR" in (tmp_path / "runs/first/report.html").read_text()
    assert (tmp_path / "compare.html").exists()


def test_figures_of_the_document(capsys):
    """docs/faces.md has what `cosface plan` prints, and equation 6."""
    document = (Path(__file__).parents[1] / "docs/faces.md").read_text()
    plans = re.findall(r"^    cosface (plan .* --memory (\d+) ?GB .*)$", document, re.M)
    assert len(plans) == 2
    for command, memory in plans:
        assert cli.main(shlex.split(command)) == 0
        printed = " ".join(capsys.readouterr().out.split())
        table, state, needed = re.search(
            r"sgd with a (\w+) table, (\w+) state and all classes on 1 device: ([\d.]+) GB", printed
        ).groups()
        said = re.search(rf"\| {memory} GB \| (\w+) table, (\w+) state \| ([\d.]+) GB", document).groups()
        # A process that has imported more takes some hundredths more.
        assert said[:2] == (table, state) and float(said[2]) == pytest.approx(float(needed), abs=0.5)
    low, high = re.search(r"at least ([\d.]+) for 200 identities and ([\d.]+) for 2,059,906", document).groups()
    assert (low, high) == tuple(f"{theory.min_scale(classes, 0.9):.1f}" for classes in (200, 2_059_906))


@pytest.mark.slow
def test_tensorboard_has_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert loop.train(settings(tmp_path / "run", "epochs=2", "tensorboard=true")) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [each.value for each in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_a_batchnorm_with_a_forward_of_its_own_is_left_alone():
    class Rectified(torch.nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), Rectified(4))
    model.sync_batchnorm(module)
    assert type(module[0]) is model.SyncedBatchNorm and type(module[1]) is Rectified
    assert (module[1](torch.randn(8, 4)) >= 0).all()
