"""Run configuration: frozen dataclasses, read from YAML and `--set` overrides. No torch here."""

from chulengo.config.load import load_config, to_yaml
from chulengo.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptConfig",
    "RunConfig",
    "TrainingConfig",
    "load_config",
    "to_yaml",
]
