"""Chooses where the fused kernels run: a CUDA device, or else Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton is imported for the first time, so this happens here, and only when
no CUDA device is there. Triton is an optional package; without it the tests of fused kernels are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_CUDA and HAS_TRITON:
    os.environ["TRITON_INTERPRET"] = "1"
    from exact_interpreter import mend_interpreter

    mend_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    """Numpy warns where the interpreter overflows to inf, as the GPU does in silence and as the kernels mean it."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where no CUDA device is there."""
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not HAS_CUDA and "gpu" in item.keywords and "tests/kernels" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this session."""
    pytest.importorskip("triton")
    return torch.device("cuda" if HAS_CUDA else "cpu")
