"""Converts a class table in another system's files to the state dict of `CosFaceLoss`, and back, every bit the same.

    CosFaceLoss                            weight (C, D)
    insightface, PartialFC_V2              weight (C_local, D), one file a rank; state_dict_softmax_fc.weight in a checkpoint
    insightface, PartialFC before it       rank_N_softmax_weight.pt, a bare tensor (C_local, D); its momentum in ..._mom.pt beside
    pml, pytorch-metric-learning           W (D, C)

Files are torch.save's or, by their suffix, .safetensors, which have no checksums.

Memory: one copy of the file being written. Inputs are mapped, and compared with the checksums in them; those of torch before 1.6,
which have none, are read whole.

With K sub-centres a class, the K rows (in pytorch-metric-learning columns) of a class lie side by side here and there, so they
are converted like K classes.
"""

import json
import os
import re
import struct
import tempfile
import warnings
import zipfile
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice
from pathlib import Path

import torch

from ..ops import formats
from ..validation import FLOAT_DTYPES

SAFETENSORS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
BARE = "bare-tensor"  # the key of a file that holds no dict but one tensor
KEYS = {None: ("weight",), "insightface": ("weight", "state_dict_softmax_fc.weight", BARE), "pml": ("W",)}
LISTED = 20  # keys, files or ranks that a message names; it counts the rest
SLAB = 8192  # rows looked through for NaN and infinity at a time, so that this takes no memory to speak of


def convert(inputs, out, *, system=None, key=None, transpose=False, to=None, ranks=1, force=False):
    """Write the table in `inputs` to `out`, and return one line that says what was written.

    Args:
        inputs: paths of files written by torch.save, or .safetensors, one, or all shards of a table; of "insightface" also its
            files of momentum, NAME_mom.pt beside NAME.pt, which are left out.
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
    inputs, momenta = without_momenta([Path(path) for path in inputs]) if system == "insightface" else ([*map(Path, inputs)], 0)
    inputs, by_rank = in_rank_order(inputs)
    if ranks > 1 and (to != "insightface" or "{rank}" not in str(out)):
        raise ValueError(f'several ranks are for "insightface" and need {{rank}} in OUT, got {ranks} ranks, {to!r} and {out}')
    with ExitStack() as stack:
        written = {}  # the target of each new file, which lies beside it, where a rename is atomic

        def prepare(rank):
            target = Path(os.path.realpath(str(out).replace("{rank}", str(rank))))
            _check_target(target, inputs, force)
            with _writing(target):
                folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".cosface-convert-")
            written[target] = Path(stack.enter_context(folder)) / "new"

        prepare(0)  # the others once there is a row for each
        keys, tables = zip(*(read_table(path, system=system, key=key, transpose=transpose) for path in inputs), strict=True)
        _check_shards(inputs, tables, system)
        num_classes, size = sum(map(len, tables)), tables[0].shape[1]
        if ranks > num_classes:
            raise ValueError(f"{num_classes:,} classes cannot be sharded over {ranks:,} ranks")
        for rank in range(1, ranks):
            prepare(rank)
        for path in inputs:
            _check_sums(path)
        not_finite = start = 0
        for (target, new), count in zip(written.items(), shard_sizes(num_classes, ranks), strict=True):
            with _writing(target):
                not_finite += _write(tables, start, start + count, new, to, target.suffix == ".safetensors")
            start += count
        for target, new in written.items():
            with _writing(target):
                os.replace(new, target)
    origin = " or ".join(dict.fromkeys(keys))
    if len(inputs) > 1:
        origin += f" of {len(inputs)} files {'by rank' if by_rank else 'in the order given'}"
    if momenta:
        origin += f", without {momenta:,} file{'s' * (momenta > 1)} of momentum"
    return (
        f"wrote {out}{f' for {ranks} ranks' if ranks > 1 else ''}: C = {num_classes:,}, D = {size:,}, {_name(tables[0].dtype)}, "
        f"from {origin}{f'; rows that are not finite: {not_finite:,}' if not_finite else ''}"
    )


def without_momenta(paths):
    """(the paths of tables, the number of others): of PartialFC before V2, NAME_mom.pt holds the momentum of NAME.pt."""
    alone = [path for path in paths if path.stem.endswith("_mom") and path.with_stem(path.stem[:-4]) not in paths]
    if alone:
        raise ValueError(
            f"the momentum of a table, and the table is not given: {_listing(sorted(map(str, alone)))}; "
            "give the files without _mom"
        )
    tables = [path for path in paths if not path.stem.endswith("_mom")]
    return tables, len(paths) - len(tables)


def in_rank_order(paths):
    """(paths, True) by the number in which alone their names differ, else (paths, False) as given: a glob has 10 before 2."""
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError(f"the same file twice: {_listing(sorted(map(str, paths)))}")
    names = [re.split(r"([0-9]+)", str(path)) for path in paths]  # text, number, text, number, ..., text
    if len({tuple(name[::2]) for name in names}) > 1:
        return paths, False
    # A set, because one rank may be named several times: rank_3/head_3.pt.
    numbers = {tuple(map(int, column)) for column in zip(*(name[1::2] for name in names), strict=True) if len(set(column)) > 1}
    if len(numbers) != 1:
        return paths, False
    (ranks,) = numbers
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"two files of one rank: {_listing(sorted(map(str, paths)))}")
    if max(ranks) >= len(ranks):
        missing = (str(rank) for rank in range(max(ranks)) if rank not in ranks)  # lazily: a date would make a long list
        listing = _listing(list(islice(missing, LISTED)), max(ranks) + 1 - len(ranks))
        raise ValueError(f"the numbers in the files' names must be ranks, 0 to {max(ranks)}; missing: {listing}")
    return [path for _, path in sorted(zip(ranks, paths, strict=True))], True


def shard_sizes(num_classes, ranks):
    """Rows of each rank in PartialFC_V2."""
    return [num_classes // ranks + (rank < num_classes % ranks) for rank in range(ranks)]


def read_table(path, *, system=None, key=None, transpose=False):
    """(dotted key, table (C, D) as a view of the mapped file)."""
    tensors = _load(path)
    wanted = KEYS[system] if key is None else (key,)
    found = [pair for pair in tensors if pair[0] in wanted]
    if system == "pml" and not found:
        wanted = (*wanted, "*.W")
        found = [pair for pair in tensors if pair[0].endswith(".W")]
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
            f"got {tuple(table.shape)} {_name(table.dtype)} {_name(table.layout)} {table.device}"
        )
    return name, table.detach().T if transpose or system == "pml" else table.detach()


def _load(path):
    """[(dotted key, tensor)] of all tensors in the nested dicts of a file, or of the one tensor that it holds."""
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe may wait for ever
        raise ValueError(f"cannot read {path}: it is not a regular file")
    try:
        is_zip = _is_zip(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {_reason(error)}") from error
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with _reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and _is_as_it_lies(path))
        content = {BARE: content} if isinstance(content, torch.Tensor) else content
        tensors = list(_flatten(content)) if isinstance(content, dict) else None
    if tensors is None:
        raise ValueError(f"{path}: holds a {type(content).__name__}, must hold a dict of tensors, or one tensor")
    return tensors


def _load_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs safetensors: pip install safetensors") from error
    try:
        return [*load_file(path).items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({_reason(error)})") from error


@contextmanager
def _reading(path):
    """Context manager that turns any error into a ValueError: a file that torch.save did not write may fail in any way."""
    try:
        yield
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds an object of {refused[1]}, and loading objects may run code; if you trust the file, load it with "
                "weights_only=False and save its state dict alone"
            ) from error
        raise ValueError(f"{path}: not a file of torch.save, or a damaged one ({_reason(error).split('. ')[0]})") from error


def _check_sums(path):
    """Raise if the file's own checksums, which torch.load does not compare, do not fit its bytes. Old files have none."""
    damaged = None
    if _is_zip(path):
        with _reading(path), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f"{path}: {damaged} in it does not match its checksum: the file was changed since, or written "
            "without checksums (torch.serialization.set_crc32_options); if you trust it, load it and save it again"
        )


def _is_zip(path):
    """True for the file format that torch can map: a zip, as torch decides."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_as_it_lies(path):
    """True for a zip whose entries are not compressed: mapped, the others' bytes would be taken for numbers."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _flatten(content, prefix=""):
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _check_shards(paths, tables, system):
    """Check that the tables are the shards of one table."""
    shapes = _listing([f"{path} {tuple(table.shape)} {_name(table.dtype)}" for path, table in zip(paths, tables, strict=True)])
    if len({(table.shape[1], table.dtype) for table in tables}) > 1:
        raise ValueError(f"shards, as (C, D), must agree in D and dtype: {shapes}")
    sizes = shard_sizes(sum(map(len, tables)), len(tables))
    if system == "insightface" and [len(table) for table in tables] != sizes:
        raise ValueError(
            f"not all shards of one table in order of rank, which PartialFC_V2 would shard in {_listing(list(map(str, sizes)))} "
            f"rows: {shapes}"
        )


def _check_target(target, inputs, force):
    """Refuse a target that cannot be written, before the inputs are read, which may take minutes."""
    is_read = target.exists() and any(path.exists() and path.samefile(target) for path in inputs)
    for is_wrong, why in (
        (target.is_dir(), "it is a folder"),
        (is_read, "it is also read"),
        (target.exists() and not target.is_file(), "it is not a regular file"),
        (target.exists() and not force, "it exists; --force replaces it"),
    ):
        if is_wrong:
            raise ValueError(f"cannot write {target}: {why}")


@contextmanager
def _writing(target):
    """An error inside names the target."""
    try:
        yield
    except Exception as error:
        while error.__context__ is not None:  # the writer of torch.save fails once more when it closes a file on a full disk
            error = error.__context__
        if not isinstance(error, Exception):
            raise error
        raise OSError(f"cannot write {target}: {_reason(error)}") from error


def _write(tables, start, stop, path, to, as_safetensors):
    """Rows start to stop of the table, safely on disk at `path`; the number of them that are not finite."""
    rows = _rows(tables, start, stop, column_major=to == "pml")
    name, table = ("W", rows.T) if to == "pml" else ("weight", rows)
    with open(path, "xb") as file:
        if as_safetensors:
            _save_safetensors(name, table, file)
        else:
            torch.save({name: table}, file)
        file.flush()
        os.fsync(file.fileno())
    return sum(int((~slab.isfinite().all(1)).sum()) for slab in rows.split(SLAB))


def _save_safetensors(name, table, file):
    """One tensor in the format of safetensors, whose own writer copies it: the size of a JSON header, this, the numbers."""
    described = {"dtype": SAFETENSORS[table.dtype], "shape": [*table.shape], "data_offsets": [0, table.nbytes]}
    header = json.dumps({name: described, "__metadata__": {"format": "pt"}}).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    file.write(memoryview(table.view(torch.uint8).numpy()))


def _rows(tables, start, stop, *, column_major):
    """Rows start to stop of the concatenated tables, (stop - start, D): the one copy."""
    firsts = accumulate(map(len, tables), initial=0)
    parts = [table[max(start - first, 0) : max(stop - first, 0)] for table, first in zip(tables, firsts, strict=False)]
    return torch.cat([part.T for part in parts], 1).T if column_major else torch.cat(parts)


def _reason(error):
    """One line of an exception, which in torch may have twenty."""
    lines = (getattr(error, "strerror", None) or str(error)).split("WeightsUnpickler error:")[-1].split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def _listing(items, total=None):
    more = (len(items) if total is None else total) - LISTED
    return (", ".join(items[:LISTED]) or "nothing") + (f" and {more:,} more" if more > 0 else "")


def _name(value):
    return str(value).removeprefix("torch.")
