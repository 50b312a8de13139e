"""What an adapter was trained on, written beside its weights, so that it means the same wherever it is copied.

PEFT records the base's name only. Which weights that name stood for, and how they were held (an adapter trained over
NF4 weights has learned to make up for their rounding), decide what the adapter does as much as its own numbers do.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from chulengo.errors import ModelError

BASE_FILE = "chulengo_base.json"


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The base of an adapter.

    Attributes:
        name: as the user gave it; None when nobody recorded it.
        revision: Hub revision.
        quantization: nf4, fp4, int8 or none; None when it is not recorded.
        double_quant: whether the block scales were quantised too.
        weights_hash: see `model.folder.weights_hash`.
    """

    name: str | None = None
    revision: str | None = None
    quantization: str | None = None
    double_quant: bool | None = None
    weights_hash: str | None = None


def save_base_record(record: BaseRecord, folder: Path) -> None:
    """Writes `chulengo_base.json` into an adapter folder; the file is whole or not there."""
    draft = folder / (BASE_FILE + ".tmp")
    draft.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / BASE_FILE)


def load_base_record(folder: Path) -> BaseRecord:
    """Returns what an adapter folder says of its base: our record, else the name that PEFT wrote.

    Raises:
        ModelError: a file of the folder cannot be read.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        file = folder / "adapter_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == BASE_FILE:
            return BaseRecord(**content)
        return BaseRecord(name=content.get("base_model_name_or_path") or None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read: {error}", next_step="copy the adapter again") from error
