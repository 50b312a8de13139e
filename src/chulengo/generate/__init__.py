"""Answers from a model: batched and streaming."""
