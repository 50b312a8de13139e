"""The finished adapter as a folder of its own: PEFT's files, and what is needed to talk to it as it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from chulengo.data.renderer import Renderer, save_renderer
from chulengo.model.base_record import BaseRecord, save_base_record
from chulengo.train.whole_files import write_folder

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "vocab.json", "merges.txt", "chat_template.jinja",
)


def write_adapter_folder(
    folder: Path, save: Callable[[Path], None], *, base: BaseRecord, base_folder: Path, renderer: Renderer
) -> None:
    """Writes the folder whole or not at all.

    Args:
        folder: its place.
        save: writes PEFT's files into the folder that it is given.
        base: what the adapter was trained on.
        base_folder: the model's, whose tokenizer files are copied.
        renderer: of the run.
    """

    def write(place: Path) -> None:
        save(place)
        (place / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with every field empty
        save_renderer(renderer, place)
        save_base_record(base, place)
        for name in TOKENIZER_FILES:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, place / name)

    write_folder(folder, write)
