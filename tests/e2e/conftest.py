"""A tiny model and tiny data for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import command_kit
import tiny_models


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 128 positions with a tokenizer; not to be written to."""
    return tiny_models.write_model_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations; not to be written to."""
    return command_kit.write_lines(tmp_path_factory.mktemp("data") / "talks.jsonl", *command_kit.conversations(24))
