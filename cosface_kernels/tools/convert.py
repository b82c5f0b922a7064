"""Converts a class table in another system's files to the state dict of `CosFaceLoss`, and back, every bit the same.

    CosFaceLoss                            weight (C, D)
    insightface, PartialFC_V2              weight (C_local, D), one file a rank; state_dict_softmax_fc.weight in a checkpoint
    insightface, PartialFC before it       rank_N_softmax_weight.pt, a bare tensor (C_local, D); its momentum in ..._mom.pt beside
    pml, pytorch-metric-learning           W (D, C)

Files are torch.save's or, by their suffix, .safetensors, which have no checksums.

Memory: one copy of the table, and with several ranks one of a shard. Inputs are mapped, and compared with the checksums in them;
those of torch before 1.6, which have none, are read whole.

With K sub-centres a class, the K rows (in pytorch-metric-learning columns) of a class lie side by side here and there, so they
are converted like K classes.
"""

import os
import re
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..ops import formats
from ..validation import FLOAT_DTYPES

BARE = "bare-tensor"  # the key of a file that holds no dict but one tensor
KEYS = {None: ("weight",), "insightface": ("weight", "state_dict_softmax_fc.weight", BARE), "pml": ("W", "*.W")}
LISTED = 20  # keys or files that a message names; it counts the rest
SLAB = 8192  # rows looked through for NaN and infinity at a time, so that this takes no memory to speak of


def convert(inputs, out, *, system=None, key=None, transpose=False, to=None, ranks=1, force=False):
    """Write the table in `inputs` to `out`, and return one line that says what was written.

    Args:
        inputs: paths of files written by torch.save, or .safetensors, one, or all shards of a table, which are put in order by
            the ranks in their names; of "insightface" also its files of momentum, NAME_mom.pt, which are left out.
        out: a path, .safetensors for that format; with several ranks its text {rank} becomes 0, 1, ...
        system: the system that wrote `inputs`, "insightface" or "pml"; None with a key, and for a state dict of CosFaceLoss.
        key: dotted key of the table in each file, for any other system.
        transpose: whether the table at `key` is (D, C).
        to: the system to write for, "insightface" or "pml"; None for CosFaceLoss.
        ranks: the number of files that "insightface" is written in.
        force: replace files that exist.

    Raises:
        ValueError: the inputs hold no such table or are damaged, or the output is refused. Nothing was written.
        OSError: writing failed. No half a file is left behind: all are written before the first of them takes its place.
    """
    if ranks > 1 and (to != "insightface" or "{rank}" not in str(out)):
        raise ValueError(f'several ranks are for "insightface" and need {{rank}} in OUT, got {ranks} ranks, {to!r} and {out}')
    inputs = _in_order(inputs, system)
    keys, tables = zip(*(read_table(path, system=system, key=key, transpose=transpose) for path in inputs), strict=True)
    _check_shards(inputs, tables, system)
    num_classes, size = sum(map(len, tables)), tables[0].shape[1]
    if not 1 <= ranks <= num_classes:
        raise ValueError(f"{num_classes:,} classes cannot be sharded over {ranks:,} ranks")
    targets = [Path(os.path.realpath(str(out).replace("{rank}", str(rank)))) for rank in range(ranks)]
    with ExitStack() as folders:
        new = {target: _beside(target, inputs, force, folders) for target in targets}
        if len(new) < ranks:
            raise ValueError(f"cannot write {out}: files of several ranks are one file")
        for path in inputs:
            _check_sums(path)
        not_finite = _write(tables, new, to)
    files = f" of {len(inputs)} files, {inputs[0].name} to {inputs[-1].name}" if len(inputs) > 1 else ""
    return (
        f"wrote {out}{f' for {ranks} ranks' if ranks > 1 else ''}: C = {num_classes:,}, D = {size:,}, {tables[0].dtype}, "
        f"from {' or '.join(dict.fromkeys(keys))}{files}{f'; rows that are not finite: {not_finite:,}' if not_finite else ''}"
    )


def _in_order(paths, system):
    """The files of tables: by rank where their names differ in numbers alone, since a shell has 10 before 2; else as given."""
    paths = [Path(path) for path in paths]
    if system == "insightface":
        momenta = [path for path in paths if path.stem.endswith("_mom")]
        paths = [path for path in paths if path not in momenta]
        if alone := [path for path in momenta if path.with_stem(path.stem[:-4]) not in paths]:
            raise ValueError(f"momentum whose table, the file without _mom, is not given: {_listing(alone)}")
    for path in paths:
        if not path.is_file():  # opening a pipe may wait for ever
            raise ValueError(f"cannot read {path}: it is not a regular file")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"the same file twice: {_listing(paths)}")
    parts = [re.split("([0-9]+)", str(path)) for path in paths]  # text, number, text, ..., text
    if len(paths) == 1 or len({tuple(part[::2]) for part in parts}) > 1:
        return paths
    columns = {tuple(map(int, column)) for column in zip(*(part[1::2] for part in parts), strict=True)}
    ranks = [column for column in columns if sorted(column) == [*range(len(paths))]]
    if len(ranks) != 1:  # shards of equal sizes would not betray a missing one, or another order
        raise ValueError(
            f"one number in the names of {len(paths)} shards must be the ranks 0 to {len(paths) - 1}: {_listing(sorted(paths))}"
        )
    return [path for _, path in sorted(zip(ranks[0], paths, strict=True))]


def read_table(path, *, system=None, key=None, transpose=False):
    """(dotted key, table (C, D) as a view of the mapped file)."""
    tensors = _load(path)
    wanted = KEYS[system] if key is None else (key,)
    found = [pair for pair in tensors if pair[0] in wanted or (system == "pml" and pair[0].endswith(".W"))]
    if len(found) != 1:
        # The table is most likely the largest matrix, and should not hide behind the layers of a backbone.
        candidates = sorted(tensors, key=lambda pair: (pair[1].dim() != 2, -pair[1].numel()))
        raise ValueError(
            f"{path}: {'several tensors' if found else 'no tensor'} at {' or '.join(wanted)}; --key NAME chooses from: "
            + _listing([f"{name} {tuple(tensor.shape)}" for name, tensor in candidates])
        )
    name, table = found[0]
    if system is None and key is None and any(other == "bias" for other, _ in tensors):
        raise ValueError(
            f"{path}: has a bias beside its weight, which no other system's file holds; --key weight takes the table alone"
        )
    scale = dict(tensors).get(f"{name}_scale")
    if table.dtype == formats.FLOAT8 and scale is not None and scale.shape == table.shape[:1]:
        table = formats.read(table, scale, slice(None))
    is_dense = table.layout == torch.strided and table.is_cpu and table.numel()
    if table.dim() != 2 or table.dtype not in FLOAT_DTYPES or not is_dense:
        raise ValueError(
            f"{path}: {name} must be a 2-D tensor of float16, bfloat16, float32 or float64, "
            f"got {tuple(table.shape)} {table.dtype} {table.layout} {table.device}"
        )
    return name, table.detach().T if transpose or system == "pml" else table.detach()


def _load(path):
    """[(dotted key, tensor)] of all tensors in the nested dicts of a file, or of the one tensor that it holds."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with _reading(path):
            return [*load_file(path).items()]
    with _reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
        if isinstance(content, dict):
            return [*_flatten(content)]
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"{path}: holds a {type(content).__name__}, must hold a dict of tensors, or one tensor")
    return [(BARE, content)]


@contextmanager
def _reading(path):
    """Context manager that turns any error into a ValueError: a damaged file may fail in any way."""
    try:
        yield
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds an object of {refused[1]}, and loading objects may run code; if you trust the file, load it with "
                "weights_only=False and save its state dict alone"
            ) from error
        raise ValueError(f"{path}: not a file of torch.save or safetensors, or a damaged one ({_reason(error)})") from error


def _check_sums(path):
    """Raise if the file's own checksums, which torch.load does not compare, do not fit its bytes. Old files have none."""
    damaged = None
    if zipfile.is_zipfile(path):
        with _reading(path), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f"{path}: {damaged} in it does not match its checksum: the file was changed since, or written "
            "without checksums (torch.serialization.set_crc32_options); if you trust it, load it and save it again"
        )


def _can_be_mapped(path):
    """True for a zip, torch.save's format since 1.6, without compressed entries, whose bytes would be taken for numbers."""
    return zipfile.is_zipfile(path) and not any(entry.compress_type for entry in zipfile.ZipFile(path).infolist())


def _flatten(content, prefix=""):
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _check_shards(paths, tables, system):
    """Check that the tables are the shards of one table."""
    shapes = _listing([f"{path} {tuple(table.shape)} {table.dtype}" for path, table in zip(paths, tables, strict=True)])
    if len({(table.shape[1], table.dtype) for table in tables}) > 1:
        raise ValueError(f"shards, as (C, D), must agree in D and dtype: {shapes}")
    smaller, larger = divmod(sum(map(len, tables)), len(tables))
    sizes = [smaller + (rank < larger) for rank in range(len(tables))]
    if system == "insightface" and [*map(len, tables)] != sizes:
        raise ValueError(
            f"not all shards of one table in order of rank, which PartialFC_V2 would shard in {_listing(sizes)} rows: {shapes}"
        )


def _beside(target, inputs, force, folders):
    """The path of a new file beside a target, where a rename is atomic, in a folder that goes with `folders`."""
    if target.exists() and any(path.samefile(target) for path in inputs):
        raise ValueError(f"cannot write {target}: it is also read")
    if target.exists() and not (force and target.is_file()):
        raise ValueError(f"cannot write {target}: it exists; --force replaces a file, and nothing else")
    with _writing(target):
        folder = folders.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".cosface-convert-"))
    return Path(folder, "new")


@contextmanager
def _writing(target):
    """Context manager that turns any error into an OSError that names the target."""
    try:
        yield
    except Exception as error:
        while error.__context__ is not None:  # the writer of torch.save fails once more when it closes a file on a full disk
            error = error.__context__
        if not isinstance(error, Exception):  # Ctrl-C
            raise error
        raise OSError(f"cannot write {target}: {_reason(error)}") from error


def _write(tables, new, to):
    """Write {target: path of its new file} and rename one after another; the number of rows that are not finite."""
    name, table = ("W", torch.cat([table.T for table in tables], 1)) if to == "pml" else ("weight", torch.cat(tables))
    for (target, path), part in zip(new.items(), table.tensor_split(len(new)), strict=True):
        part = part.clone() if len(new) > 1 else part  # torch.save of a view writes the whole table
        with _writing(target):
            _save({name: part}, path, as_safetensors=target.suffix == ".safetensors")
    for target, path in new.items():
        with _writing(target):
            os.replace(path, target)
    rows = table.T if to == "pml" else table
    return sum(int((~slab.isfinite().all(1)).sum()) for slab in rows.split(SLAB))


def _save(content, path, as_safetensors):
    """Write a file that is safely on the disk on return."""
    with open(path, "wb") as file:  # given a path, torch.save does not say why a disk takes no more
        mode = os.fstat(file.fileno()).st_mode
        if not as_safetensors:
            torch.save(content, file)
    if as_safetensors:
        from safetensors.torch import save_file

        save_file(content, path, {"format": "pt"})
        os.chmod(path, mode)  # it makes a file that nobody else may read
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _reason(error):
    """The first words of an exception, which in torch may have twenty lines."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.strip().split("\n")[0].split(". ")[0]


def _listing(items):
    more = f" and {len(items) - LISTED:,} more" if len(items) > LISTED else ""
    return (", ".join(map(str, items[:LISTED])) or "nothing") + more
