from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chulengo.errors import TrainingError
from chulengo.train.checkpoint import check_same_settings, defect, newest_good, steps, write_checkpoint


def content(step: int, size: int = 1000) -> object:
    def write(folder: Path) -> None:
        (folder / "a.bin").write_bytes(bytes([step]) * size)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.json").write_text(json.dumps({"step": step}))

    return write


def write(folder: Path, step: int, **changes: object) -> Path:
    return write_checkpoint(folder, step, content(step), **{"keep": 2, **changes})  # type: ignore[arg-type]


def test_a_written_checkpoint_is_whole(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    assert checkpoint == tmp_path / "checkpoint-3"
    assert defect(checkpoint) is None
    assert json.loads((checkpoint / "complete.json").read_text())["files"].keys() == {"a.bin", "sub/b.json"}
    assert newest_good(tmp_path) == checkpoint


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step, protect=[4] if step >= 4 else [])
    assert steps(tmp_path) == [4, 8, 10]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda c: (c / "a.bin").write_bytes(b"\x01" * 999 + b"\x00"), "a.bin was changed"),
        (lambda c: (c / "a.bin").write_bytes(b"\x01" * 500), "a.bin has 500 bytes of 1,000"),
        (lambda c: (c / "sub" / "b.json").unlink(), "sub/b.json is missing"),
        (lambda c: (c / "complete.json").unlink(), "no complete.json"),
        (lambda c: (c / "complete.json").write_text('{"files"'), "unreadable complete.json"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path: Path, harm: object, says: str) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    harm(newer)  # type: ignore[operator]
    messages: list[str] = []
    assert newest_good(tmp_path, messages.append) == older
    assert len(messages) == 1
    assert "checkpoint-2" in messages[0]
    assert says in messages[0]


def test_none_when_all_are_damaged_or_there_are_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "absent") is None
    (write(tmp_path, 1) / "a.bin").unlink()
    assert newest_good(tmp_path) is None


def test_a_failing_writer_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_checkpoint(tmp_path, 2, fail, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_librarys_word_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    write(tmp_path, 1)

    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(TrainingError, match="disk is full") as caught:
        write_checkpoint(tmp_path, 2, fail, keep=1)
    assert "checkpoint-1 is untouched" in str(caught.value)
    assert steps(tmp_path) == [1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_real_full_disk(small_disk: Path) -> None:
    write_checkpoint(small_disk, 1, content(1, 100_000), keep=2)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="disk is full"):
        write_checkpoint(small_disk, 2, content(2, 200_000), keep=2)  # type: ignore[arg-type]
    assert [p.name for p in small_disk.iterdir()] == ["checkpoint-1"]
    assert defect(small_disk / "checkpoint-1") is None


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    # works without root, unlike a small file system
    code = f"""
import resource, signal
from pathlib import Path
from chulengo.errors import TrainingError
from chulengo.train.checkpoint import defect, steps, write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
write_checkpoint(folder, 1, lambda f: (f / "a").write_bytes(bytes(1000)) and None, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_checkpoint(folder, 2, lambda f: (f / "a").write_bytes(bytes(5000)) and None, keep=2)
except TrainingError as error:
    print(error)
print(steps(folder), defect(folder / "checkpoint-1"))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "disk is full" in out
    assert "[1] None" in out


def test_killed_at_any_moment_there_is_always_a_whole_one(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from chulengo.train.checkpoint import write_checkpoint
def content(step):
    def write(folder):
        for i in range(20):
            (folder / f"f{{i}}").write_bytes(bytes([step % 256]) * 20_000)
    return write
step = 0
while True:
    step += 1
    write_checkpoint(Path({str(tmp_path)!r}), step, content(step), keep=2)
    print(step, flush=True)
"""
    for attempt in range(6):
        shutil.rmtree(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.011 * (attempt + 1))
        process.send_signal(signal.SIGKILL)
        last = int((["1", *process.stdout.read().split()])[-1])
        process.wait()
        good = newest_good(tmp_path)
        assert good is not None
        assert int(good.name.split("-")[1]) >= last
        assert all(defect(tmp_path / f"checkpoint-{s}") is None for s in steps(tmp_path))
        following = int(good.name.split("-")[1]) + 1
        write(tmp_path, following, keep=1)
        assert [p.name for p in tmp_path.iterdir()] == [f"checkpoint-{following}"], "what the kill left is gone"


def test_it_appears_in_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(TrainingError, match="could not be written: Input/output error"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_same_step_twice_is_one_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 5)
    assert steps(tmp_path) == [5]
    (tmp_path / "checkpoint-5" / "a.bin").unlink()
    write(tmp_path, 5)  # a torn one is replaced
    assert defect(tmp_path / "checkpoint-5") is None


def test_changed_settings_are_named() -> None:
    check_same_settings({"a": 1, "b": [1, 2]}, {"a": 1, "b": (1, 2)})
    with pytest.raises(TrainingError) as caught:
        check_same_settings({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5})
    text = str(caught.value)
    assert "b: 2 -> 4" in text
    assert "gone: 3 -> null" in text
    assert "new: null -> 5" in text
    assert "a:" not in text


def test_whoever_the_umask_lets_may_read(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "secretive").write_text("")
        (folder / "secretive").chmod(0o600)  # as safetensors makes its files

    before = os.umask(0o022)
    try:
        checkpoint = write_checkpoint(tmp_path, 1, write, keep=1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in checkpoint.iterdir()} == {0o644}
