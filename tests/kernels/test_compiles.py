"""Every fused kernel compiles for a Hopper GPU, spills nothing and writes 16 bytes at a time; no GPU needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 232448  # what one program may use on compute capability 9.0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program here")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["case"] for row in rows}) == 23
    assert [row for row in rows if row["spilled"] != 0] == []
    assert [row for row in rows if row["store_bytes"] < 16] == []
    assert [row for row in rows if row["shared"] > SHARED_BYTES] == []
