from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import chulengo
from chulengo.train.manifest import cuda_driver, git_state, manifest, masked, own_git_state, versions


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_manifest_says_what_a_run_was_made_of(tmp_path: Path) -> None:
    started = datetime.datetime(2026, 11, 20, 12, 0, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    found = manifest(
        hashes={"model": "ab"}, seeds={"training": 3}, command=["chulengo", "train"], started=started, folder=tmp_path,
        extra={"note": "x"},
    )
    assert found["started_utc"] == "2026-11-20T10:00:00+00:00"
    assert found["chulengo"] == chulengo.__version__
    assert found["python"] == platform.python_version()
    assert found["hashes"] == {"model": "ab"}
    assert found["seeds"] == {"training": 3}
    assert found["git"] is None
    assert found["note"] == "x"
    assert json.loads(json.dumps(found)) == found


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys\nfrom chulengo.train.manifest import manifest\nm = manifest(hashes={}, seeds={})\n"
        "assert m['versions']['torch'], m\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert versions(["no-such-package"]) == {"no-such-package": None}


def test_git_commit_and_dirt(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-qm", "a")
    head = _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": head, "dirty": True}


def test_secrets_are_masked_and_nothing_else_is() -> None:
    command = [
        "chulengo", "train", "--token", "correct horse", "--set", "hub.api_key=xyz", "--data",
        "https://me:secret@host/x", "--set", "training.max_seq_tokens=512", "--set", "lora.rank=16", "hf_ABCDEFGHIJKLM",
        "--password=pw", "--data=plain",
    ]
    assert masked(command) == [
        "chulengo", "train", "--token", "***", "--set", "hub.api_key=***", "--data",
        "https://***@host/x", "--set", "training.max_seq_tokens=512", "--set", "lora.rank=16", "***",
        "--password=***", "--data=plain",
    ]


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version: gcc 13\n")
    assert cuda_driver(file) == "580.82.07"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@x)  Tue\n"
    )
    assert cuda_driver(file) == "580.159.04"
    assert cuda_driver(tmp_path / "none") is None


def test_own_commit_only_from_a_checkout_that_tracks_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "theirs"
    package = repository / "venv" / "chulengo"
    package.mkdir(parents=True)
    file = package / "__init__.py"
    file.write_text("")
    _git(repository, "init", "-q")
    (repository / "notes").write_text("")
    _git(repository, "add", "notes")
    _git(repository, "commit", "-q", "-m", "theirs")
    monkeypatch.setattr(chulengo, "__file__", str(file))
    assert own_git_state() is None
    _git(repository, "add", str(file))
    _git(repository, "commit", "-q", "-m", "ours")
    assert own_git_state() == {"commit": _git(repository, "rev-parse", "HEAD"), "dirty": False}
