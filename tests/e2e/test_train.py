"""The road a user takes: train, look at what was written, score it, ask it; every recipe; a real data set."""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from chulengo.cli.main import main
from chulengo.config import load_config, to_yaml
from chulengo.data.renderer import load_renderer
from chulengo.data.tokenizer import load_tokenizer
from chulengo.model.base_record import BaseRecord, load_base_record
from chulengo.model.folder import weights_hash
from chulengo.train.metrics import MetricsFile
from command_kit import Capture, conversation, conversations, done, write_lines

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NUM_STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """24 training rows, one of them too long, and 5 others to validate on."""
    folder = tmp_path_factory.mktemp("data")
    rows = [*conversations(23), conversation("And?", "llama " * 200)]
    held = [conversation(f"Where is {i}?", f"In the Andes, near {i + 1}.") for i in range(5)]
    return write_lines(folder / "talks.jsonl", *rows), write_lines(folder / "held.jsonl", *held)


def trained(tiny_model: Path, data: tuple[Path, Path], out: Path, *more: str) -> Path:
    train, held = data
    settings = ["training.epochs=2", "training.learning_rate=5e-3", "training.overlong=drop",
                f"data.validation={held}", *more]  # fmt: skip
    words = ["train", "--model", tiny_model, "--data", train, "--out", out]
    assert main([*map(str, words), *(word for setting in settings for word in ("--set", setting))]) == 0
    return out


@pytest.fixture(scope="module")
def run(tiny_model: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over NF4 weights."""
    return trained(tiny_model, data, tmp_path_factory.mktemp("runs") / "nf4")


def test_description(run: Path, tiny_model: Path) -> None:
    text = (run / "config.yaml").read_text()
    config = load_config(run / "config.yaml", saved=True)
    assert to_yaml(config) == text
    resolved = (config.prompt.style, config.model.compute_dtype, config.training.max_seq_tokens)
    assert resolved == ("llama2", "float32", 128), "every auto is written as what it stood for"
    assert (config.out, config.model.name) == (str(run), str(tiny_model))
    manifest = json.loads((run / "manifest.json").read_text())
    tokenizer = load_tokenizer(run / "adapter")
    assert manifest["hashes"]["config"] == hashlib.sha256(text.encode()).hexdigest()
    assert manifest["hashes"]["model"] == weights_hash(tiny_model)
    assert manifest["hashes"]["renderer"] == load_renderer(run / "adapter", tokenizer).fingerprint()
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["hashes"]["data"])
    assert manifest["hashes"]["data"] != manifest["hashes"]["validation"]
    assert manifest["seeds"] == {"training": 0, "data": 0}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["config"]["lora.rank"] == 16
    ledger = json.loads((run / "ledger.json").read_text())
    assert (ledger["train"]["num_rows"], ledger["train"]["num_used_rows"]) == (24, 23)
    assert [row["source"].endswith("talks.jsonl:24") for row in ledger["train"]["long_rows"]] == [True]
    assert ledger["validation"]["num_rows"] == 5
    assert not (run / "run.lock").exists()


def test_metrics_and_result(run: Path) -> None:
    rows = MetricsFile(run / "metrics.jsonl").rows()
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in train] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in validation] == [0, 6, 12]
    for row in train:
        assert {"epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s",
                "step_s", "peak_bytes", "elapsed_s"} <= row.keys()  # fmt: skip
    ledger = json.loads((run / "ledger.json").read_text())
    assert sum(row["supervised_tokens"] for row in train) == 2 * ledger["train"]["num_supervised_tokens"]
    assert {row["supervised_tokens"] for row in validation} == {ledger["validation"]["num_supervised_tokens"]}
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == NUM_STEPS
    assert result["base_loss"] == validation[0]["loss"]
    assert result["tuned_loss"] == min(row["loss"] for row in validation[1:])
    assert result["tuned_perplexity"] < result["base_perplexity"] / 2


def test_pictures(run: Path) -> None:
    png = (run / "plots" / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") == 1600
    root = ET.parse(run / "plots" / "loss.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_adapter_folder(run: Path, tiny_model: Path) -> None:
    folder = run / "adapter"
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "chulengo_renderer.json",
            "chulengo_base.json"} <= names  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model.resolve())
    assert (config["r"], config["lora_alpha"]) == (16, 32.0)
    record = load_base_record(folder)
    assert record == BaseRecord(str(tiny_model), None, "nf4", True, weights_hash(tiny_model))
    usual = (run / "config.yaml").stat().st_mode
    assert {file.name for file in folder.iterdir() if file.stat().st_mode != usual} == set()
    newest = run / "checkpoints" / f"checkpoint-{NUM_STEPS}"
    assert (newest / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_plain_peft_loads_it_and_computes_the_same(
    tiny_model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    import peft
    import transformers

    from chulengo.model.session import open_session

    folder = trained(tiny_model, data, tmp_path / "run", "model.quantization=none", "lora.rslora=true") / "adapter"
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 200, 77]])
    with torch.no_grad():
        alone = base(ids).logits
        plain = peft.PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits
        ours = open_session(None, str(tmp_path / "run"), device="cpu", engine="reference").model(ids).logits
    assert torch.equal(plain, ours)
    assert (plain - alone).abs().max() > 0.1


def test_eval_finds_the_perplexities_of_the_run(run: Path, data: tuple[Path, Path], capsys: Capture) -> None:
    out, _ = done(capsys, "eval", "--adapter", run, "--data", data[1], "--json", "--device", "cpu")
    scores = json.loads(out)["scores"]
    result = json.loads((run / "result.json").read_text())
    for side in ("base", "tuned"):
        loss = scores[side][0]["details"]["loss"]
        assert loss == pytest.approx(result[f"{side}_loss"], rel=1e-6), side


def test_generate_with_the_adapter(run: Path, tiny_model: Path, capsys: Capture) -> None:
    words = ["generate", "--prompt", "What is 3?", "--max-new-tokens", "12", "--json", "--device", "cpu"]
    tuned, _ = done(capsys, *words, "--adapter", run, "--both")
    answers: dict[str, Any] = json.loads(tuned)
    assert answers["answer"] != answers["base"]
    again, _ = done(capsys, *words, "--adapter", run / "adapter")
    assert json.loads(again)["answer"] == answers["answer"]


def test_the_screen(tiny_model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    out, said = done(capsys, "train", "--model", tiny_model, "--data", data[0], "--out", tmp_path / "run",
                     "--set", "training.overlong=drop")  # fmt: skip
    assert "Supervision ledger" in out
    assert "Validation perplexity: " in out
    assert f"chulengo chat --adapter {tmp_path}/run" in out
    assert "validation at step 0: loss" in said
    noise = ("Warning", "warnings.warn", "kernels-community", "Failed to load", "it/s]", "Loading weights")
    assert not [word for word in noise if word in out + said]


def test_dry_run_writes_nothing(
    tiny_model: Path, data: tuple[Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = done(capsys, "train", "--model", tiny_model, "--data", data[0], "--set", "training.overlong=drop",
                  "--dry-run")  # fmt: skip
    assert "nothing was trained" in out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A Llama with 4,096 positions, 40 rows of guanaco's form and 40 of columns, for what a recipe names on the Hub."""
    folder = tmp_path_factory.mktemp("stand-ins")
    rows = [{"text": f"<s>[INST] What is {i}? [/INST] It is {i}. </s>"} for i in range(40)]
    model = tiny_models.write_model_folder(folder / "llama", max_position_embeddings=4096)
    columns = [{"question": f"What is {i}?", "answer": f"{i}.", "text": f"Film {i}", "label": i % 2} for i in range(40)]
    return model, write_lines(folder / "guanaco.jsonl", *rows), write_lines(folder / "columns.jsonl", *columns)


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_every_recipe(
    recipe: Path, stand_ins: tuple[Path, Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe)
    monkeypatch.chdir(recipe.parents[1])  # a recipe names its prompt's file from here
    model, data = stand_ins[0], stand_ins[2 if config.prompt.template else 1]
    words: list[object] = ["train", "--config", recipe, "--dry-run", "--offline", "--out", tmp_path / "run"]
    if "/" in config.model.name:
        words += ["--model", model]
    if "/" in config.data.train:
        words += ["--data", data]
    out, _ = done(capsys, *words)
    assert "the data and the configuration are fine" in out
    assert not (tmp_path / "run").exists()
    text = recipe.read_text()
    assert f"chulengo train --config recipes/{recipe.name}" in text, "a recipe says how it is used"


def test_there_are_the_promised_recipes() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert {"llama2_7b_guanaco_1gpu", "llama2_7b_openassistant_guanaco_1gpu", "nano_demo_cpu"} <= names
    assert len([name for name in names if name.startswith("nano") and "guanaco" in name]) == 1
    shipped = load_config(Path(__file__).parents[2] / "src" / "chulengo" / "nano" / "demo" / "recipe.yaml")
    assert shipped == load_config(next(recipe for recipe in RECIPES if recipe.stem == "nano_demo_cpu"))


@pytest.mark.slow
def test_one_epoch_of_alpaca_halves_perplexity(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    model, data = shared_data / "stories260K", shared_data / "alpaca" / "alpaca_en_demo.json"
    if not (model.is_dir() and data.is_file()):
        pytest.skip("no stories260K or alpaca among the shared data")
    settings = ["training.learning_rate=5e-3", "training.overlong=cut", "training.allow_cut_end_of_turn=true"]
    words = [word for setting in settings for word in ("--set", setting)]
    done(capsys, "train", "--model", model, "--data", data, "--out", tmp_path / "run", *words)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = MetricsFile(tmp_path / "run" / "metrics.jsonl").rows()
    assert rows[-2]["epoch"] == 1.0
    assert result["tuned_perplexity"] < result["base_perplexity"] / 2
    # recorded on 2 CPU cores (torch 2.13, transformers 5.23, peft 0.21.2): 65.09 before, 14.52 after
    assert result["base_perplexity"] == pytest.approx(65.09, rel=0.01)
    assert result["tuned_perplexity"] == pytest.approx(14.5, rel=0.05)
