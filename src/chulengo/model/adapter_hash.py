"""Which weights an adapter's folder holds now: a run that is trained again keeps its name and changes its answers."""

from __future__ import annotations

import hashlib
from pathlib import Path


def adapter_hash(folder: Path | None) -> str | None:
    """Returns `sha256:…` over an adapter's configuration and weights; None without an adapter.

    An adapter of a 7B model is some 160 MB, which takes 0.1 s.
    """
    if folder is None:
        return None
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
