"""Every fused kernel compiles for a Hopper GPU, spills nothing and writes 16 bytes at a time; no GPU needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = 232448  # what one program may use on compute capability 9.0


NUMBERS_OF_TOKENS = (64, 50, 1)  # a multiple of 16, none, and 1: Triton knows ints of each kind apart
NEEDS_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program here")


def rows_of_script(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@NEEDS_X86
def test_compiles_for_hopper(tmp_path: Path) -> None:
    rows = rows_of_script(tmp_path)
    assert len({row["case"] for row in rows}) == 25
    assert [row for row in rows if row["spilled"] != 0] == []
    assert [row for row in rows if row["store_bytes"] < 16] == []
    assert [row for row in rows if row["shared"] > SHARED_BYTES] == []


def test_no_kernel_is_compiled_again_for_another_number_of_tokens(tmp_path: Path) -> None:
    """Batches differ in their tokens, and a kernel that is compiled in the middle of a run takes its seconds there."""
    keys: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows_of_script(tmp_path, *map(str, NUMBERS_OF_TOKENS)):
        keys.setdefault((row["case"], row["kernel"]), {})[row["tokens"]] = row["key"]
    assert len({case for case, _ in keys}) == 25
    assert all(len(of_case) == len(NUMBERS_OF_TOKENS) for of_case in keys.values())
    assert [case for case, of_case in keys.items() if len(set(of_case.values())) > 1] == []
