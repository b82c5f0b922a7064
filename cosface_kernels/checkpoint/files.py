"""Is a folder there as a whole, and is every byte of it as it was written?

A checkpoint is written into `<folder>.tmp-<random>`: every file is hashed as it is written and fsynced as it is closed,
then comes manifest.json with all sizes and SHA-256 sums, an fsync of the folder, and a rename that makes it a checkpoint.
A save that died at any point leaves a temporary folder, which nobody reads and the next save of that name removes.
"""

import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "manifest.json"
FORMAT = 1
_TEMPORARY = re.compile(r"(?P<name>.+)\.tmp-[0-9a-f]{16}")


class CorruptCheckpointError(RuntimeError):
    """A checkpoint on disk is not as it was written: a file is missing, truncated or changed."""


class _HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it, and is on the disk once it is closed."""

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
            if stream.failure is not None:  # of which torch.save's writer says nothing in its own error
                raise stream.failure from None
            raise
        self.written[Path(path).name] = {"size": stream.size, "sha256": stream.sha256.hexdigest()}

    def rename(self, path, new_path):
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def mkdir(self, path):
        """Nothing: rank 0 made it, and where another rank cannot see it the disk is not shared."""

    def put(self, path, data):
        with self.create_stream(path, "wb") as stream:
            stream.write(data)


def begin(folder):
    """A new temporary folder for the checkpoint `folder`; those that killed saves of it left are removed."""
    if os.path.lexists(folder):
        raise FileExistsError(
            f"{folder} exists, and a checkpoint is never written over: save into a new folder for each step, or remove it first"
        )
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        _sync_folder(parent.parent)
    for path in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"):
        if (match := _TEMPORARY.fullmatch(path.name)) and match["name"] == folder.name:
            shutil.rmtree(path)
    temporary = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(8)}")
    temporary.mkdir()
    return temporary


def finish(temporary, folder, written):
    """Makes the temporary folder the checkpoint `folder`."""
    manifest = json.dumps({"format": FORMAT, "files": dict(sorted(written.items()))}, indent=1)
    HashedFiles().put(temporary / MANIFEST, manifest.encode())
    _sync_folder(temporary)
    os.rename(temporary, folder)
    _sync_folder(folder.parent)


def _sync_folder(folder):
    """What was created or renamed in it is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder):
    """{name: {"size", "sha256"}} of every file of a checkpoint."""
    if not folder.is_dir():
        is_file = folder.exists()
        raise FileNotFoundError(
            f"{folder} is a file, and a checkpoint is a folder" if is_file else f"there is no checkpoint {folder}"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] == FORMAT:
            return {name: {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in manifest["files"].items()}
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{folder} has no {MANIFEST}: it is no finished checkpoint of save_checkpoint's") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    raise CorruptCheckpointError(f"{folder} has format {manifest['format']!r}, this version reads {FORMAT}")


def verify(folder, manifest, share, shares):
    """Compares every `shares`-th file with the manifest, from the `share`-th largest on."""
    by_size = sorted(manifest, key=lambda name: (-manifest[name]["size"], name))
    for name in by_size[share::shares]:
        path, wanted = folder / name, manifest[name]
        try:
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


def latest_checkpoint(parent):
    """The finished checkpoint in the folder `parent` whose name ends in the largest number (step-2000), or None."""
    finished = (path.parent for path in Path(parent).glob(f"*/{MANIFEST}") if not _TEMPORARY.fullmatch(path.parent.name))
    numbered = [(int(match[0]), path) for path in finished if (match := re.search(r"[0-9]+$", path.name))]
    return max(numbered)[1] if numbered else None
