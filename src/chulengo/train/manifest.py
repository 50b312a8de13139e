"""What a run was made of: enough to say, a year later, whether two runs can be compared.

Recorded: versions (read from package metadata, nothing is imported for it), device and driver, the git commit of the
*user's* working folder and, where Chulengo runs from a checkout, its own, seeds, the command line and whatever hashes
the caller computed. Never recorded: environment variables, and the value of any argument that looks like a secret,
because manifests are published with adapters.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chulengo

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton",
    "datasets", "tokenizers", "sentencepiece", "safetensors", "numpy",
)  # fmt: skip
MASK = "***"
# "token" without its plural: max_seq_tokens is no secret
_SECRET_NAME = re.compile(r"(token|secrets?|passw(or)?ds?|api[-_.]?keys?|access[-_.]?keys?|credentials?|auth)$", re.I)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|AKIA[A-Z0-9]{12,})"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def manifest(
    *,
    hashes: Mapping[str, str],
    seeds: Mapping[str, int],
    command: Sequence[str] | None = None,
    started: datetime.datetime | None = None,
    folder: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the manifest of a run as a JSON-able dict.

    Args:
        hashes: what the caller hashed, by name (model, data, renderer, config).
        seeds: every seed by its name.
        command: the argument list; None: this process's own.
        started: when the run started, with a time zone; None: now.
        folder: whose git repository is recorded; None: the working folder.
        extra: further entries of the caller; they may not replace one of ours.
    """
    started = started or datetime.datetime.now(datetime.UTC)
    entries: dict[str, Any] = {
        "chulengo": chulengo.__version__,
        "chulengo_git": own_git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": devices(),
        "cuda_driver": cuda_driver(),
        "cpu": {"model": cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "git": git_state(folder or Path.cwd()),
        "command": masked(sys.argv if command is None else command),
        "seeds": dict(seeds),
        "hashes": dict(hashes),
        "started_utc": started.astimezone(datetime.UTC).isoformat(timespec="seconds"),
    }
    clash = entries.keys() & (extra or {}).keys()
    assert not clash, f"extra manifest entries {sorted(clash)} would replace ours"
    return entries | dict(extra or {})


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Returns the installed version of each package by name, None where it is not installed. Imports none of them."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """Returns name, memory in bytes and compute capability of each GPU; empty when torch is not loaded or sees none."""
    torch = sys.modules.get("torch")  # a run has it loaded; a manifest alone is no reason to load it
    if torch is None or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        found.append({"name": facts.name, "memory_bytes": facts.total_memory, "capability": capability})
    return found


def cuda_driver(version_file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Returns the version of NVIDIA's kernel driver, such as "580.82.07", or None where there is none."""
    try:
        text = version_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"Kernel Module\D+?(\d+(?:\.\d+)+)", text.replace("x86_64", "").replace("aarch64", ""))
    return match.group(1) if match else None


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the processor's name as the system gives it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns {"commit", "dirty"} of the repository that holds the folder, or None when there is none (or no git)."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def own_git_state() -> dict[str, Any] | None:
    """Returns the same for the checkout that Chulengo's own code runs from, or None when it is an installed copy.

    A copy in a virtual environment inside somebody's repository is not that repository's: it does not track the file.
    """
    file = Path(chulengo.__file__).resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return git_state(file.parent)


def masked(command: Sequence[str]) -> list[str]:
    """Returns the argument list with secrets replaced by `***`: by the option's name, or by the look of the value."""
    shown = []
    hide_next = False
    for argument in command:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("--"):
            shown.append(MASK)
        elif equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={MASK}")
        else:
            shown.append(_URL_LOGIN.sub(MASK, _SECRET_VALUE.sub(MASK, argument)))
        hide_next = argument.startswith("-") and not equals and bool(_SECRET_NAME.search(argument))
    return shown


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns git's output, or None when git is missing, slow, or finds no repository."""
    # fsmonitor off: a repository's own configuration could otherwise start a program of its choice
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, env=os.environ | quiet
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
