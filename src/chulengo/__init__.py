"""Chulengo: QLoRA fine-tuning of Llama 2 chat models, from raw conversations to a measured model."""

__version__ = "0.1.0"
