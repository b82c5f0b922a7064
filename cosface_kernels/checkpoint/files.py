"""Checkpoint folders that appear as a whole or not at all, and whose every byte is verified.

A checkpoint is written into `<folder>.tmp-<random>`: every file is hashed as it is written and fsynced as it is closed,
then comes manifest.json with all sizes and SHA-256 sums, an fsync of the folder, and a rename that makes it a checkpoint.
One that takes the place of another changes names with it in one call of the system; where the disk has none, the other is
`<folder>.replaced` for that moment.
A save that died at any point leaves a temporary folder. Nobody reads it, and the next save of that name removes it: that save
holds the lock of the name, which the system takes from a process that dies, so no living process writes there.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import warnings
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = re.compile(r"(?P<name>.+)\.tmp-[0-9a-f]{16}")
_SHA256 = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[\w.-]{1,255}", re.ASCII)  # of a file, as a save writes them
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>[0-9]+)")


class CorruptCheckpointError(RuntimeError):
    """Raised for a checkpoint on disk that is not as it was written: a file is missing, truncated or changed."""


class _HashedFile(io.BufferedWriter):
    """A new file that hashes the bytes written to it, and fsyncs when it is closed."""

    def __init__(self, path):
        super().__init__(io.FileIO(path, "x"))
        self.size, self.sha256, self.failure = 0, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def close(self):
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


class HashedFiles(FileSystem):
    """DCP's file system with `written`, the size and the SHA-256 sum of each file by name.

    DCP's own fsync of its metadata comes before Python's buffer is flushed, and so may sync nothing.
    """

    def __init__(self):
        self.written = {}

    @contextmanager
    def create_stream(self, path, mode):
        try:
            with _HashedFile(path) as stream:
                yield stream
        except RuntimeError:
            if stream.failure is not None:  # torch.save's own error does not name the cause
                raise stream.failure from None
            raise
        self.written[Path(path).name] = {"size": stream.size, "sha256": stream.sha256.hexdigest()}

    def rename(self, path, new_path):
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def mkdir(self, path):
        """Do nothing: rank 0 made the folder. A rank that cannot see it has no shared disk, and fails."""

    def put(self, path, data):
        with self.create_stream(path, "wb") as stream:
            stream.write(data)


@contextmanager
def temporary_folder(folder, overwrite=False):
    """Yield a new folder for the files of the checkpoint `folder`; remove it after the block unless `finish` has renamed it.

    Removes the folders that killed saves of that name left.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        _sync_folder(parent.parent)
    with _only_save_of(folder) as others_are_dead:
        if os.path.lexists(folder):
            _check_replaceable(folder, overwrite)
        for path in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*") if others_are_dead else ():
            if (match := _TEMPORARY.fullmatch(path.name)) and match["name"] == folder.name:
                shutil.rmtree(path)
        temporary = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(8)}")
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _only_save_of(folder):
    """Yield True if no other save of that name is running; raise if one is. False on a disk without locks, where nobody knows."""
    path = folder.with_name(f"{folder.name}.tmp-lock")
    descriptor, locked = _locked(path, folder)
    while locked and not _is_at(descriptor, path):  # the previous save removed the lock's file after it was opened here
        os.close(descriptor)
        descriptor, locked = _locked(path, folder)
    try:
        yield locked
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path, folder):
    """(an open file, whether it is locked)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return descriptor, False
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise FileExistsError(
            f"another process or thread is saving {folder} now: save into a folder of its own, or wait until it has ended"
        ) from None
    return descriptor, True


def _is_at(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_replaceable(folder, overwrite):
    """Raise unless what has the name of a new checkpoint is a finished one that it may take the place of."""
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists, and a checkpoint is never written over: save into a new folder for each step, or pass "
            "overwrite=True"
        )
    if folder.is_symlink() or not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} exists and is no finished checkpoint: overwrite=True takes the place of nothing else")


def finish(temporary, folder, written, overwrite=False):
    """Rename the temporary folder to the checkpoint `folder`; with overwrite, change its name with the one that is there.

    Raises, and leaves things as they were, if files are missing.
    """
    manifest = json.dumps({"format": FORMAT, "files": dict(sorted(written.items()))}, indent=1)
    files = HashedFiles()
    files.put(temporary / MANIFEST, manifest.encode())
    _sync_folder(temporary)
    is_taken = overwrite and os.path.lexists(folder)
    take_name, give_back = (_exchange, _exchange) if is_taken else (os.rename, lambda a, b: os.rename(b, a))
    take_name(temporary, folder)
    lost = [name for name, file in (written | files.written).items() if not _has_size(folder / name, file["size"])]
    if lost:
        give_back(temporary, folder)
        raise RuntimeError(f"something else has removed or changed {', '.join(lost)}")
    _sync_folder(folder.parent)


def _exchange(path, other):
    """Two folders change their names: at once where the system can, else with a moment in which `other` is missing."""
    if _renameat2 is not None and _renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    aside = Path(f"{other}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(other, aside)
    os.rename(path, other)
    os.rename(aside, path)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # a libc of before 2018 has none


def check_options(folder, keep, overwrite):
    """Check what save_checkpoint is told of other checkpoints."""
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite must be True or False, got {overwrite!r}")
    if keep is None:
        return
    if not isinstance(keep, int) or isinstance(keep, bool):
        raise TypeError(f"keep must be an int or None, got {keep!r}")
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, got {keep}")
    if not _NUMBERED.fullmatch(folder.name):
        raise ValueError(f"keep needs a name that ends in a number, such as step-2000, got {folder.name}")


def remove_older(folder, keep):
    """Remove finished checkpoints beside `folder` whose names differ from its by a smaller number, all but the keep - 1 newest.

    One that cannot be removed is a warning: the new one is saved.
    """
    stem, number = _NUMBERED.fullmatch(folder.name).groups()
    beside = [(path.parent, _NUMBERED.fullmatch(path.parent.name)) for path in folder.parent.glob(f"*/{MANIFEST}")]
    older = [(int(found["number"]), path) for path, found in beside if found and found["stem"] == stem]
    older = sorted((each, path) for each, path in older if each < int(number) and not path.is_symlink())
    for _, path in older[: len(older) - (keep - 1)]:
        try:
            gone = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
            os.rename(path, gone)  # so that half of it is no checkpoint
            shutil.rmtree(gone)
        except OSError as error:
            warnings.warn(f"the older checkpoint {path} could not be removed: {error}", stacklevel=2)


def _has_size(path, size):
    try:
        with open(path, "rb") as stream:  # on a network's disk only an open is sure to see what another rank wrote
            return os.fstat(stream.fileno()).st_size == size
    except FileNotFoundError:
        return False


def _sync_folder(folder):
    """fsync a folder, so that names created or changed in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder):
    """{name: {"size", "sha256"}} of every file of a checkpoint, each name one of that folder's own."""
    if not folder.is_dir():
        is_file = folder.exists()
        raise FileNotFoundError(
            f"{folder} is a file, and a checkpoint is a folder" if is_file else f"there is no checkpoint {folder}"
        )
    path = folder / MANIFEST
    if not path.exists():
        raise CorruptCheckpointError(f"{folder} has no {MANIFEST}: it is no finished checkpoint of save_checkpoint's")
    _check_regular(path)
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptCheckpointError(f"{path} is damaged: it has no files")
    if type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
        raise CorruptCheckpointError(f"{folder} has format {str(manifest.get('format'))[:20]}, this version reads {FORMAT}")
    for name, file in manifest["files"].items():
        _check_entry(path, name, file)
    return manifest["files"]


def _check_entry(path, name, file):
    """Check an entry of the manifest: the name of a file in that folder, a size and a SHA-256 sum."""
    if not _NAME.fullmatch(name) or name in (".", "..", MANIFEST):
        raise CorruptCheckpointError(f"{path} is damaged: {name!r} is no name of a file of its folder")
    size, sha256 = (file.get("size"), file.get("sha256")) if isinstance(file, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise CorruptCheckpointError(f"{path} is damaged: {name!r} has no size and SHA-256 sum, got {str(file)[:100]}")


def _check_regular(path):
    """Raise for anything but a regular file: to open a device, a pipe or a socket may act, or wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorruptCheckpointError(f"{path} is no regular file, and was not opened")


def verify(folder, manifest, share, shares):
    """Compare every `shares`-th file with the manifest, from the `share`-th largest on."""
    by_size = sorted(manifest, key=lambda name: (-manifest[name]["size"], name))
    for name in by_size[share::shares]:
        path, wanted = folder / name, manifest[name]
        try:
            _check_regular(path)
            size = path.stat().st_size
            sha256 = _sha256(path) if size == wanted["size"] else None
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{path} is missing") from None
        if size != wanted["size"]:
            raise CorruptCheckpointError(f"{path} has {size} bytes, {wanted['size']} were written: truncated or changed")
        if sha256 != wanted["sha256"]:
            raise CorruptCheckpointError(f"{path} was changed since it was written: its SHA-256 sum is another one")


def _sha256(path):
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(2**22):
            sha256.update(block)
    return sha256.hexdigest()


def latest_checkpoint(parent: str | PathLike[str]) -> Path | None:
    """The finished checkpoint in the folder `parent` whose name ends in the largest number (step-2000), or None."""
    finished = (path.parent for path in Path(parent).glob(f"*/{MANIFEST}") if not _TEMPORARY.fullmatch(path.parent.name))
    numbered = [(int(match[0]), path) for path in finished if (match := re.search(r"[0-9]+$", path.name))]
    return max(numbered)[1] if numbered else None
