"""Data for tests that go through whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import command_kit


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations; not to be written to."""
    return command_kit.write_lines(tmp_path_factory.mktemp("data") / "talks.jsonl", *command_kit.conversations(24))
