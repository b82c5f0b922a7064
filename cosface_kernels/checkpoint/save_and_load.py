"""Checkpoints of a module and its optimisers, written by W ranks and read by any other number, whole or not at all."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ..distributed.ranks import world
from . import files, names, optimizer_state, random_states
from .files import CorruptCheckpointError, HashedFiles, latest_checkpoint
from .metadata import METADATA, CheckedReader, read_metadata
from .pieces import PiecewiseSavePlanner, RowsLoadPlanner
from .plain_data import packed, unpacked

__all__ = ["CorruptCheckpointError", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    folder: str | PathLike[str],
    module: nn.Module,
    optimizer: Optimizer | dict[str, Optimizer] | Sequence[Optimizer] | None = None,
    *,
    extra: Any = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> None:
    """Saves module, optimisers and random number generators into a new folder, which appears as a whole or not at all.

    All ranks of the default process group call it, if there is one. Sharded tensors (DTensor) are written by their ranks, plain
    ones, taken to be alike on all ranks, by rank 0. No copy of a table is made. A failure on any rank is raised on all of them,
    and leaves earlier checkpoints as they were.

    Args:
        folder: path of the new checkpoint, on a disk that all ranks share; must not exist, unless overwrite.
        module: with every parameter of the optimisers; parameters and persistent buffers are saved.
        optimizer: a torch.optim.Optimizer, or a dict or sequence of them; state and options are saved by the parameters' names.
        extra: plain data of this rank's own, such as {"epoch": 3, "sampler": sampler.state_dict()}: numbers, strings, tensors,
            and tuples, lists and dicts of them.
        keep: how many checkpoints of names like this one's, but for the number at the end (step-1000, step-2000), to keep: this
            one and the keep - 1 with the largest smaller numbers. The others are removed after it is saved. None: all.
        overwrite: whether the new checkpoint, once it is whole, takes the place of one that is there, such as "best". They
            change names at once; on a disk that cannot do that, the old one is `<folder>.replaced` for a moment.

    Raises:
        FileExistsError: folder exists, or is no checkpoint that can be overwritten, or another save of it has not ended.
        ValueError: an optimiser has a parameter that module lacks; a PartialFC_V2 on several ranks; keep is less than 1, or the
            name ends in no number.
        TypeError: module is no nn.Module; extra, or an option of an optimiser, is not plain data; keep is no int, overwrite no
            bool.
        OSError: no space left, or another failure of a disk.
        RuntimeError: another failure of a rank.
    """
    folder, ranks = Path(folder), world()
    _together(lambda: _check_module(module))
    _together(lambda: files.check_options(folder, keep, overwrite))
    tensors, small = _together(lambda: _contents(module, optimizer, extra))
    with ExitStack() as stack:
        own = _together(lambda: stack.enter_context(files.temporary_folder(folder, overwrite)) if ranks.rank == 0 else None)
        try:
            temporary, written = ranks.objects(own)[0], {}
            for part in ranks.objects(_together(lambda: _write(temporary, tensors, small))):
                written |= part
            _together(lambda: files.finish(temporary, folder, written, overwrite) if ranks.rank == 0 else None)
        except Exception as error:
            raise _not_saved(folder, error) from error
    if keep is not None and ranks.rank == 0:
        files.remove_older(folder, keep)


def load_checkpoint(
    folder: str | PathLike[str],
    module: nn.Module,
    optimizer: Optimizer | dict[str, Optimizer] | Sequence[Optimizer] | None = None,
    *,
    grow: Sequence[str] = (),
    strict: bool = True,
) -> Any:
    """Loads what `save_checkpoint` saved, by any number of ranks, into module and optimisers of equal names, shapes and dtypes.

    Names are equal too if torch.compile, DataParallel or DistributedDataParallel wraps a part of module here and did not there,
    or the reverse: `_orig_mod.` and `module.` in them do not count where the rest is the name of one tensor alone.

    First all checksums are verified, each rank its share of the files, and all of it is compared with module and optimisers; only
    then is anything changed. A tensor may have been sharded and be plain now, or the reverse. State of an optimiser is loaded in
    place where it exists, and allocated where it does not.

    Nothing in a checkpoint is run: pickles in it may name tensors, numbers and the like, and nothing else, and files are those of
    the folder. Its numbers are trusted: whoever can write the folder can write other ones, and sums that fit.

    Random number generators go on where each rank's stopped if the number of ranks is the same. If not, they stay as they are,
    with a warning, and every rank gets rank 0's `extra`.

    Args:
        folder: a checkpoint.
        module, optimizer: as they were saved, of any values; without an optimiser the module alone is loaded. Parameter groups
            may be others, where the options of those that become one are equal.
        grow: names of parameters and buffers that may have more rows here than in the checkpoint, such as ("head.weight",). The
            further rows keep their values, and their optimiser state is zero: so does a sharded table get new identities.
        strict: whether module must have the checkpoint's names and no others. If not, what one of them lacks stays as it is, or
            is not loaded, as in load_state_dict: a head that is sampled only now has a sample_step more. A head says with a
            warning that its class table stayed as it is.

    Returns:
        This rank's `extra`, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no folder.
        CorruptCheckpointError: a file is missing, truncated or changed, or none of save_checkpoint's.
        ValueError: names, shapes or dtypes are others, all listed; nothing was changed.

    Warns:
        UserWarning: another number of ranks, on rank 0.
    """
    folder, ranks = Path(folder), world()
    _together(lambda: _check_module(module))
    manifest = _together(lambda: files.read_manifest(folder))
    _together(lambda: files.verify(folder, manifest, ranks.rank, ranks.size))
    metadata, shared, own = _together(lambda: _read(folder, manifest))
    state, optimizers, tensors = _together(
        lambda: _prepare(folder, module, optimizer, metadata=metadata, shared=shared, grow=grow, strict=strict)
    )
    _together(lambda: _read_tensors(folder, metadata, tensors))
    module.load_state_dict(state, strict=strict)
    for each, found in optimizers.values():
        optimizer_state.apply(each, *found)
    if shared["world_size"] == ranks.size:
        random_states.restore(own["random"])
    elif ranks.rank == 0:
        warnings.warn(
            f"{folder} was saved by {shared['world_size']} ranks and is loaded by {ranks.size}: random number generators were "
            "not restored, seed them on every rank",
            stacklevel=2,
        )
    return own["extra"]


def _together(step):
    return world().together("the agreement on a checkpoint", step)


def _check_module(module):
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an nn.Module, got {type(module).__name__}: put several in an nn.ModuleDict, and plain data in extra"
        )


def _contents(module, optimizer, extra):
    """({key: tensor}, {file name: bytes}) that this rank saves."""
    for each in module.modules():
        if hasattr(each, "check_checkpoint"):  # raises where what it has cannot be saved
            each.check_checkpoint()
    ranks, state = world(), module.state_dict()
    tensors = {f"module/{name}": value for name, value in state.items() if _is_in_place(name, value)}
    shared = {
        "world_size": ranks.size,
        "module": {name: value for name, value in state.items() if not _is_in_place(name, value)},
        "optimizers": {},
    }
    for name, each in optimizer_state.by_name(optimizer).items():
        found, shared["optimizers"][name] = optimizer_state.flatten(f"optimizer/{name}", each, module)
        tensors |= found
    small = {f"rank_{ranks.rank}.pt": packed("extra", {"random": random_states.states(), "extra": extra})}
    shared = packed("an option of an optimizer, or extra state of module,", shared)
    return tensors, small | ({"shared.pt": shared} if ranks.rank == 0 else {})


def _is_in_place(name, value):
    """True if a value of module.state_dict() is a tensor of the module, and not a result of get_extra_state."""
    return isinstance(value, torch.Tensor) and not name.endswith("_extra_state")


def _write(temporary, tensors, small):
    """Write this rank's files. Returns {name: {"size", "sha256"}}."""
    writer = dcp.FileSystemWriter(temporary, sync_files=False, overwrite=False)
    writer.fs = hashed = HashedFiles()
    _run_dcp(dcp.save, tensors, storage_writer=writer, planner=PiecewiseSavePlanner())
    for name, data in small.items():
        hashed.put(temporary / name, data)
    return hashed.written


def _not_saved(folder, error):
    """The error to raise for a save that failed."""
    text = error if world().has_group else f"rank 0: {type(error).__name__}: {error}"  # in a group it names its rank
    message = f"checkpoint {folder} was not saved, earlier ones are as they were: {text}"
    return OSError(error.errno, message) if isinstance(error, OSError) and error.errno else RuntimeError(message)


def _read(folder, manifest):
    """Read everything but the tensors: DCP's metadata, the data that all ranks share, and this rank's own."""
    _check_named(folder, manifest, {METADATA, "shared.pt", "rank_0.pt"})
    metadata = read_metadata(folder, manifest)
    shared = unpacked(folder / "shared.pt", lambda found: _is_shared(found, metadata.state_dict_metadata))
    own = f"rank_{world().rank if shared['world_size'] == world().size else 0}.pt"
    _check_named(folder, manifest, {own})
    return metadata, shared, unpacked(folder / own, _is_own)


def _check_named(folder, manifest, needed):
    if missing := sorted(needed - manifest.keys()):
        raise CorruptCheckpointError(f"{folder / files.MANIFEST} is damaged: it has no {missing}")


def _is_shared(found, saved):
    return (
        isinstance(found, dict)
        and type(found.get("world_size")) is int
        and isinstance(found.get("module"), dict)
        and isinstance(found.get("optimizers"), dict)
        and all(optimizer_state.is_flat(f"optimizer/{name}", each, saved) for name, each in found["optimizers"].items())
    )


def _is_own(found):
    """True if a value has an `extra`, and states that this process's random number generators accept."""
    try:
        random_states.restore(found["random"], tries=True)
        return "extra" in found
    except Exception:  # each generator has errors of its own
        return False


def _prepare(folder, module, optimizer, metadata, shared, grow, strict):
    """(the module's state to be, {name: (optimizer, its state to be)}, {key: tensor to load into}), if all of it fits."""
    saved = metadata.state_dict_metadata
    everything = module.state_dict()
    in_place = [name for name, value in everything.items() if _is_in_place(name, value)]
    if unknown := [name for name in grow if name not in in_place]:
        raise ValueError(f"grow must have names of parameters and buffers of module, got {unknown}; there are {in_place}")
    there = names.in_checkpoint(everything, [*_of_module(saved), *shared["module"]])
    grow = [there[name] for name in grow]
    state = {there[name]: everything[name] for name in in_place}
    plain = set(there.values()) - state.keys()
    if not strict:
        state = {name: value for name, value in state.items() if f"module/{name}" in saved}
    problems = _differences(state, saved, grow, strict)
    if strict and plain != shared["module"].keys():
        problems.append(f"there is extra state {sorted(shared['module'])} in the checkpoint, {sorted(plain)} here")
    tensors, optimizers = {f"module/{name}": value for name, value in state.items()}, {}
    named = optimizer_state.by_name(optimizer)
    if named and named.keys() != shared["optimizers"].keys():
        problems.append(f"there are optimizers {[*shared['optimizers']]} in the checkpoint, {[*named]} here")
    elif not problems:
        for name, each in named.items():
            found, prepared, differences = optimizer_state.prepare(
                f"optimizer/{name}", each, module, saved=shared["optimizers"][name], metadata=saved, grow=grow, there=there
            )
            optimizers[name] = each, prepared
            tensors |= found
            problems += differences
    if problems:
        raise ValueError(f"{folder} does not fit, and nothing was loaded:\n  " + "\n  ".join(problems))
    here = {name: own for own, name in there.items()}
    return {here.get(name, name): value for name, value in (state | shared["module"]).items()}, optimizers, tensors


def _of_module(saved):
    """{name: what metadata says of it} of the module's tensors in a checkpoint."""
    return {key.removeprefix("module/"): found for key, found in saved.items() if key.startswith("module/")}


def _differences(state, saved, grow, strict):
    """The differences between module and checkpoint, a sentence for each."""
    saved, problems = _of_module(saved), []
    if strict:
        other_format = {f"{name}_scale" for name in state.keys() & saved.keys() if _dtypes_differ(state[name], saved[name])}
        hints = dict.fromkeys(other_format, "")  # of a float8 table on one side, without which it is none
        hint = "; strict=False leaves it out"
        for name in saved.keys() - state.keys():
            problems.append(f"{name} is in the checkpoint and not in module{hints.get(name, hint)}")
        for name in state.keys() - saved.keys():
            problems.append(f"{name} is in module and not in the checkpoint{hints.get(name, hint)}")
    for name in state.keys() & saved.keys():
        here, there = state[name], saved[name]
        fits = here.shape == there.size
        same_rows = here.dim() == len(there.size) > 0 and here.shape[1:] == there.size[1:]
        if not fits and not (name in grow and same_rows and len(here) > there.size[0]):
            hint = f": load it into one of {there.size[0]} rows and then call grow or remove" if same_rows else ""
            if hint and len(here) > there.size[0]:
                hint += f", or pass grow=({name!r},)"
            problems.append(f"{name} has shape {tuple(there.size)} in the checkpoint, {tuple(here.shape)} here{hint}")
        if _dtypes_differ(here, there):
            hint = "load it into a module of that dtype, and that module's state_dict() into this one"
            problems.append(f"{name} is {there.properties.dtype} in the checkpoint, {here.dtype} here: {hint}")
        if here.is_meta:
            problems.append(f"{name} has no memory here, on the meta device: call to_empty first")
    return sorted(problems)


def _dtypes_differ(here, there):
    return here.dtype != there.properties.dtype


def _read_tensors(folder, metadata, tensors):
    try:
        _run_dcp(dcp.load, tensors, storage_reader=CheckedReader(folder, metadata), planner=RowsLoadPlanner())
    except Exception as error:
        raise RuntimeError(f"{folder} could not be read to its end; module and optimizers have a part of it now") from error


def _run_dcp(function, tensors, **options):
    """Run DCP's save or load, without its warning that there is one process. Raises the first rank's own error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            function(tensors, no_dist=not world().has_group, **options)
        except CheckpointException as failure:
            failed = min(failure.failures)
            error = failure.failures[failed][0]
            error.failed_rank = failed
            raise error from None
