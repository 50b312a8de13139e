"""What belongs together opens, what does not is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models as tiny
from chulengo.data.types import Message
from chulengo.errors import ModelError, RenderError
from chulengo.generate.engine import answer_all
from chulengo.generate.settings import GenerationSettings
from chulengo.model.base_record import BaseRecord, load_base_record, save_base_record
from chulengo.model.folder import weights_hash
from chulengo.model.session import Session, adapter_folder, open_session

QUESTION = [[Message("user", "Where do guanacos live?")]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run folder as training leaves it."""
    tiny.write_adapter(base, tmp_path / "run" / "adapter")
    record = BaseRecord(str(base), None, "none", True, weights_hash(base))
    save_base_record(record, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    return tmp_path / "run"


def ids(session: Session, side: str) -> tuple[int, ...]:
    with session.side(side) as model:
        return answer_all(model, session.renderer, QUESTION, GenerationSettings(max_new_tokens=12))[0].ids


def test_a_base_alone(base: Path) -> None:
    session = open_session(str(base), device="cpu")
    assert not session.has_adapter
    assert session.quantization == "none"
    assert session.context == 128
    assert session.renderer.style == "llama2"
    assert "style llama2 · context 128 tokens" in session.describe()
    assert ids(session, "base") == ids(session, "tuned")


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_a_run_brings_its_base_and_renderer(run: Path, base: Path, inner: str) -> None:
    session = open_session(None, str(run / inner), device="cpu")
    assert session.has_adapter
    assert session.model_name == str(base)
    assert session.adapter == run / "adapter"
    assert session.notes == ()
    alone = open_session(str(base), device="cpu")
    assert ids(session, "base") == ids(alone, "base")
    assert ids(session, "tuned") != ids(session, "base")
    # and the adapter is on again after the base has answered
    assert ids(session, "tuned") == ids(open_session(str(base), str(run), device="cpu"), "tuned")


def test_the_base_is_held_as_in_training(run: Path) -> None:
    pytest.importorskip("bitsandbytes")
    record = load_base_record(run / "adapter")
    save_base_record(replace(record, quantization="nf4"), run / "adapter")
    assert open_session(None, str(run), device="cpu").quantization == "nf4"
    assert open_session(None, str(run), device="cpu", quantization="none").quantization == "none"


def test_an_adapter_copied_elsewhere_still_knows_its_base(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "moved")
    session = open_session(None, str(tmp_path / "moved"), device="cpu")
    assert session.quantization == "none"
    assert session.notes == ()


def test_an_adapter_that_others_trained(run: Path, base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run / "adapter", moved)
    (moved / "chulengo_base.json").unlink()
    session = open_session(None, str(moved), device="cpu")
    assert session.model_name == str(base)  # PEFT's own record
    assert any("quantised" in note for note in session.notes)
    (moved / "chulengo_renderer.json").unlink()
    assert any("chat style is unknown" in note for note in open_session(None, str(moved), device="cpu").notes)


def test_other_weights_under_the_same_name_are_refused(run: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert open_session(str(other), str(run), device="cpu").has_adapter  # the same weights elsewhere are welcome
    model = tiny.tiny_llama(vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(ModelError, match="the weights differ"):
        open_session(str(other), str(run), device="cpu")


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 1}])
def test_an_adapter_for_another_shape_is_refused(run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    (run / "adapter" / "chulengo_base.json").unlink()  # nothing but the shapes tells
    other = tiny.write_model_folder(tmp_path / "other", **changes)
    with pytest.raises(ModelError, match=r"cannot be put|not made for"):
        open_session(str(other), str(run), device="cpu")


def test_another_rendering_than_in_training_is_refused(run: Path) -> None:
    for rendering in ({"style": "plain"}, {"system": "Be brief."}, {"train_on": "everything"}):
        with pytest.raises(RenderError, match="was trained with prompt"):
            open_session(None, str(run), device="cpu", rendering=rendering)
    open_session(None, str(run), device="cpu", rendering={"style": "llama2", "train_roles": ("assistant",)})
    open_session(None, str(run), device="cpu", rendering={"style": "auto"})


def test_a_changed_tokenizer_is_refused(run: Path) -> None:
    saved = run / "adapter" / "chulengo_renderer.json"
    content = json.loads(saved.read_text())
    content["golden"][0]["ids"][2] += 1
    saved.write_text(json.dumps(content))
    with pytest.raises(RenderError, match="golden"):
        open_session(None, str(run), device="cpu")


def test_what_is_no_adapter(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter folder"):
        adapter_folder(str(tmp_path / "missing"))
    (run.parent / "search").mkdir()
    near = str(run.parent / "nosearch")
    with pytest.raises(ModelError, match="--adapter with a finished run"):  # not the folder without an adapter
        adapter_folder(near)
    other = shutil.copytree(run, run.parent / "searched")
    with pytest.raises(ModelError, match=f"try:     --client {re.escape(str(other))}$"):
        adapter_folder(near, "--client")
    with pytest.raises(ModelError, match="is a model"):
        adapter_folder(str(base))
    with pytest.raises(ModelError, match="holds no adapter"):
        adapter_folder(str(tmp_path))
    shutil.rmtree(run / "adapter")
    with pytest.raises(ModelError, match="has no adapter yet"):
        adapter_folder(str(run))


def test_an_adapter_that_names_no_base(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run / "adapter", moved)
    (moved / "chulengo_base.json").unlink()
    config = moved / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base"):
        open_session(None, str(moved), device="cpu")
