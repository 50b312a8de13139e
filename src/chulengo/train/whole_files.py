"""Files and folders that are written whole or not at all, so that a crash never tears one.

Single files: a temporary file in the same folder, fsync, then `os.replace`. Folders of results (the adapter) likewise,
through a staging folder beside their place. Whoever may read what the process's umask allows may read them: some
libraries make files that only their owner may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chulengo.errors import TrainingError

RESUME = "resume the run"  # in what to type next; `open_folder` puts the command with the folder in its place
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG})
STAGING = ".staging-"


def sha256_of(file: Path) -> str:
    """Returns the hash of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a full disk and a forbidden place into errors that say what to do; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise TrainingError(
                f"No space left on the disk of {path}: it was not written, what was there before is intact.",
                next_step=f"free some space, then {RESUME}",
            ) from error
        if error.errno in FORBIDDEN:
            raise TrainingError(
                f"Cannot write to {path}: {error.strerror}.", allowed="a folder that you may write to",
                next_step="choose another --out",
            ) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all: after a crash there is the old content or the new, never a part.

    Raises:
        TrainingError: no space left on the disk (the old content is still there).
    """
    path = Path(path)
    with explained(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON as `write_bytes` does; NaN and infinities, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder whole or not at all: after a crash there is the old one or the new one.

    Args:
        folder: its place; what is there is replaced.
        write: writes the files into the folder that it is given, a staging folder beside the place.

    Raises:
        TrainingError: no space left on the disk, or no permission (the old folder is still there).
    """
    staging, old = (folder.with_name(f"{STAGING}{kind}{folder.name}") for kind in ("", "old-"))
    for left in (staging, old):
        if left.exists():
            shutil.rmtree(left)
    with explained(folder):
        try:
            staging.mkdir()
            write(staging)
            open_to_readers(staging)
            for file in (path for path in staging.rglob("*") if path.is_file()):
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
            if folder.exists():
                folder.replace(old)
            staging.replace(folder)
            sync_folder(folder.parent)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            # safetensors reports a full disk as an error of its own, with the system's number in the text
            number = next((n for n in FULL if f"os error {n}" in str(error)), None)
            if number is not None and not isinstance(error, OSError):
                raise OSError(number, os.strerror(number), str(folder)) from error
            raise
    if old.exists():
        shutil.rmtree(old)


def open_to_readers(folder: Path) -> None:
    """Gives every file in a folder the mode that the umask gives to new files."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        os.chmod(file, 0o666 & ~_umask())


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    """Returns the value with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
