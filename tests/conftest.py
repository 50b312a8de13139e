"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models gain nothing from a second thread, and two that wait for each other on a busy machine are 10 times slower
# (the fast engine's tests: 244 s instead of 36)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is first imported, by whichever test, whether its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CHULENGO_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no folder with real data: set CHULENGO_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a random model of a family (see fast_models.FAMILIES); not to be written to."""
    from fast_models import make_family

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_family(family, tmp_path_factory.mktemp("family"))
        return made[family]

    return folder
