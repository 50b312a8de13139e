"""The embedded model: where its weights and its demo data lie. Imports nothing heavy."""

from importlib import resources
from pathlib import Path


def _folder() -> Path:
    return Path(str(resources.files("chulengo.nano")))


def model_dir() -> Path:
    """Returns the folder with config.json, model.safetensors and tokenizer.model."""
    return _folder() / "model"


def demo_train() -> Path:
    """Returns the demo's training conversations, one JSON object a line."""
    return _folder() / "demo" / "train.jsonl"


def demo_heldout() -> Path:
    """Returns the demo's held-out conversations: the same facts asked in other words."""
    return _folder() / "demo" / "heldout.jsonl"


def demo_recipe() -> Path:
    """Returns the settings of the demo's training run, the same as recipes/nano_demo_cpu.yaml."""
    return _folder() / "demo" / "recipe.yaml"
