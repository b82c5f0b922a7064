"""The settings of a run: one dataclass, read from a YAML file and `key=value`, every one checked before anything is imported."""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

BUILT_IN_SIZES = {"faces": 32, "digits": 16}


class ConfigError(ValueError):
    """Raised for a setting that is unknown, or of the wrong type or value."""


def _setting(default, what, choices=None, low=-math.inf, high=math.inf):
    make = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"what": what, "choices": choices, "range": (low, high)})


@dataclass
class Config:
    data: str = _setting("", "faces:IDENTITIES[:IMAGES], digits, a folder with a folder an identity, a .rec file, or .tar shards")
    out: str = _setting("", "folder of the run")
    epochs: int = _setting(20, "passes over the data", low=1)
    batch_size: int = _setting(128, "images of a step, on all processes together", low=1)
    seed: int = _setting(0, "of weights, order, augmentation and rendered faces", low=0, high=2**31)

    image_size: int | None = _setting(None, "pixels (null: 32 for faces, 16 for digits, 112 for files)", low=8)
    flip: bool | None = _setting(None, "mirror half of the images (null: all data but digits)")
    crop: float = _setting(0.0, "shift images by up to this part of their size", low=0, high=0.5)
    downscale: float = _setting(
        0.0, "the share of images brought down to a half or a quarter of their size, and up again", low=0, high=1
    )
    held_out: int = _setting(100, "rendered identities beyond those of training, to verify at the end; of faces: alone", low=2)
    workers: int = _setting(2, "processes that read images", low=0)
    max_damaged: int = _setting(100, "damaged images that are skipped before the run stops", low=0)

    backbone: str | None = _setting(
        None, "small, iresnet18/50/100, sphere4/20/64, timm:NAME or MODULE:FUNCTION (null: by image size)"
    )
    embedding_size: int = _setting(128, "D", low=1)
    margin: str = _setting("CosFace(0.35)", "a class of cosface_kernels.margins with its arguments")
    scale: float | None = _setting(None, "s (null: the margin's own)", low=0)
    margin_warmup: float = _setting(0.0, "the first part of the steps, in which m rises from 0", low=0, high=1)
    centers_per_class: int = _setting(1, "K", low=1)
    sample_rate: float = _setting(1.0, "the share of classes that take part in a step", low=1e-9, high=1)
    table_format: str = _setting("float32", "of the class table", ("float32", "bfloat16", "float8"))

    optimizer: str = _setting("sgd", "of backbone and table", ("sgd", "adamw"))
    fused: bool = _setting(True, "FusedSGD or FusedAdamW for the table; false: torch.optim's")
    state_format: str = _setting("float32", "of the fused optimizer's state", ("float32", "bfloat16", "int8"))
    lr: float = _setting(0.02, "the highest learning rate, for about 128 images a step; about 1e-3 for adamw", low=0)
    momentum: float = _setting(0.9, "of sgd", low=0, high=1)
    weight_decay: float = _setting(5e-4, "of backbone and table", low=0)
    schedule: str = _setting("cosine", "of the learning rate", ("cosine", "poly", "step", "constant"))
    warmup: float = _setting(0.05, "the first part of the steps, in which the learning rate rises from 0", low=0, high=1)
    milestones: list[float] = _setting(  # noqa: RUF009
        [0.5, 0.75, 0.9], "parts of the steps after which `step` divides the rate by 10", low=0, high=1
    )
    clip: float | None = _setting(None, "the largest norm of the backbone's gradient", low=1e-9)
    accumulate: int = _setting(1, "pieces in which a batch is computed", low=1)
    ema: float | None = _setting(None, "decay of a running mean of the backbone's weights, such as 0.999", low=0, high=0.999999)

    device: str | None = _setting(None, "cpu or cuda (null: cuda where there is a GPU)", ("cpu", "cuda"))
    precision: str = _setting("float32", "bfloat16: autocast", ("float32", "bfloat16"))
    compile: bool = _setting(False, "torch.compile for the backbone")
    sync_batchnorm: bool = _setting(True, "batch statistics over all processes")

    checkpoint_every: int = _setting(500, "steps", low=1)
    keep: int = _setting(2, "checkpoints that are kept", low=1)
    log_every: int = _setting(10, "steps", low=1)
    tensorboard: bool = _setting(True, "write its files too, where it is installed")


FIELDS = {each.name: each for each in dataclasses.fields(Config)}
# Settings that --resume may change: none that changes a number of the run.
FREE = ("out", "workers", "max_damaged", "checkpoint_every", "keep", "log_every", "tensorboard")


def of_command(arguments, resume=False, only_shown=False):
    """The Config of a command line; with only_shown it may lack data and out.

    With resume, that of the run in out=, in which only FREE settings may change.
    """
    config = parse(arguments)
    path = Path(config.out) / "config.yaml"
    if resume and not config.data and not path.exists():
        where = f"{config.out} is no run, it has no config.yaml" if config.out else "out is missing"
        raise ConfigError(f"{where}: --resume goes on with the run in out=; a new one needs data= too")
    if not (resume and config.out and path.exists()):
        return config if only_shown and not (config.data and config.out) else resolved(config)
    saved = read(path)
    resumed = parse(arguments, saved)
    for name in FIELDS.keys() - set(FREE):
        if getattr(resumed, name) != saved.get(name, getattr(resumed, name)):
            raise ConfigError(
                f"{name} cannot change with --resume: the run has {saved[name]!r}; those that can are {', '.join(FREE)}"
            )
    return resumed


def parse(arguments, base=None):
    """The Config of YAML files and `key=value`, later ones first. base: a dict of settings to begin with."""
    values = dict(base or {})
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and "/" not in key:
            values[key] = _value(key, value, "the command line")
        else:
            values |= read(argument)
    return Config(**values)


def read(path):
    """{name: value} of a YAML file."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; settings are a YAML file or key=value") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path} must be lines of key: value, got a {type(found).__name__}")
    return {key: _value(key, value, path) for key, value in (found or {}).items()}


def of_run(folder):
    """The path of a run's config.yaml. FileNotFoundError: the folder is no run."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no run: it has no config.yaml, which `cosface train out={folder}` writes")
    return path


def resolved(config):
    """The config with every null that has a value by the data; what goes together is checked."""
    if not config.data or not config.out:
        raise ConfigError(f"{'data' if not config.data else 'out'} is missing: cosface train data=faces:100 out=runs/first")
    kind = config.data.partition(":")[0]
    size = config.image_size or BUILT_IN_SIZES.get(kind, 112)
    flip = kind != "digits" if config.flip is None else config.flip
    backbone = config.backbone or ("small" if size <= 64 else "iresnet18")
    if not config.fused and (config.table_format, config.state_format, config.sample_rate) != ("float32", "float32", 1):
        raise ConfigError(
            "table_format, state_format and sample_rate need fused=true: torch.optim rounds to nearest, which loses small "
            "updates, and has no step of a part of the rows with momentum and weight decay"
        )
    return dataclasses.replace(config, image_size=size, flip=flip, backbone=backbone)


def text(config):
    """YAML of all settings, with what each is."""
    lines = []
    for name, each in FIELDS.items():
        choices = each.metadata["choices"]
        what = each.metadata["what"]
        if choices and "null" not in what:
            what += f" ({', '.join(choices)})"
        setting = f"{name}: {json.dumps(getattr(config, name))}"
        lines.append(f"{setting:<32}  # {what}")
    return "\n".join(lines) + "\n"


def _value(key, value, where):
    """A value from YAML or the command line as the type of its field."""
    if key not in FIELDS:
        near = difflib.get_close_matches(str(key), FIELDS, 1, 0.4)
        raise ConfigError(f"{where} has {key!r}, which is no setting" + (f": did you mean {near[0]}?" if near else ""))
    kind, metadata = FIELDS[key].type, FIELDS[key].metadata
    if isinstance(kind, types.UnionType):  # with None
        if value is None or value in ("null", "none", ""):
            return None
        kind = typing.get_args(kind)[0]
    try:
        found = _converted(kind, value)
        numbers = found if isinstance(found, list) else [found]
        low, high = metadata["range"]
        if not all(isinstance(each, str | bool) or (low <= each <= high and math.isfinite(each)) for each in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} must be {_named(kind, metadata)}, got {value!r} in {where}") from None
    if metadata["choices"] and found not in metadata["choices"]:
        raise ConfigError(f"{key} must be one of {', '.join(metadata['choices'])}, got {value!r} in {where}")
    return found


def _converted(kind, value):
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if typing.get_origin(kind) is list:
        parts = value.strip("[]").split(",") if isinstance(value, str) else value
        return [_converted(float, part) for part in parts]
    if isinstance(value, bool):
        raise TypeError
    number = float(value)  # YAML takes 1e-3 for a text
    if kind is int and number != int(number):
        raise ValueError
    return kind(number)


def _named(kind, metadata):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    bounds = [
        f"{word} {f'{each:,}' if isinstance(each, int) else f'{each:g}'}"
        for word, each in zip(("from", "to"), metadata["range"], strict=True)
        if math.isfinite(each)
    ]
    return " ".join([names.get(kind, "numbers with commas between"), *bounds])
