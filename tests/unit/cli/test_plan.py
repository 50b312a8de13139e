from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from chulengo.cli.main import main
from chulengo.cli.plan import parse_size
from chulengo.errors import ConfigError

SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def seven_b(tmp_path: Path) -> Path:
    """A folder whose config is Llama 2 7B's and whose weights are one byte: planning must not look at them."""
    folder = tmp_path / "seven_b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN_B))
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    return folder


def test_a_run_that_fits(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "training.max_seq_tokens=2048", "--set", "training.gradient_checkpointing=true"]
    assert main(["plan", "--model", str(seven_b), "--device-memory", "24GiB", *settings]) == 0
    out = capsys.readouterr().out
    for part in ("6,738,415,616 parameters, 39,976,960 trained", "quantised weights", "3.11 GiB", "logits and loss",
                 "CUDA context", "24.00 GiB free: fits"):  # fmt: skip
        assert part in out


def test_a_run_that_does_not_fit_exits_with_2_and_the_way_out(
    seven_b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", str(seven_b), "--device-memory", "24GiB", "--set", "training.max_seq_tokens=2048"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "does not fit, 211%" in captured.out
    assert "This run does not fit: it needs 50.59 GiB, and the planned device has 24.00 GiB free." in captured.err
    assert "--set training.gradient_checkpointing=true" in captured.err
    # what it says to type, typed
    assert main([*arguments, "--set", "training.gradient_checkpointing=true"]) == 0


def test_json_is_one_object_also_when_it_does_not_fit(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(seven_b), "--device-memory", "8GiB", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["smallest_change"][0] == "training.gradient_checkpointing=true"
    assert sum(found["plan"]["parts"].values()) == found["plan"]["device_bytes"]
    assert found["settings"]["row_tokens"] == 4096  # the model's context


def test_steps_tokens_and_the_longest_row_of_the_data(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon a time"}]}] * 20
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["plan", "--model", str(shared_data / "stories260K"), "--data", str(data), "--json",
                 "--set", "data.validation_fraction=0", "--set", "training.batch_size=3", "--set", "training.epochs=2",
                 "--set", "training.gradient_accumulation=2", "--set", "model.device=cpu"]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["data"]
    assert facts["rows"] == 20
    assert facts["steps"] == 2 * 4  # ceil(20 / 6) an epoch
    assert facts["tokens"] == 20 * facts["longest_row"]
    assert 0 < facts["supervised_tokens"] < facts["tokens"]
    assert found["settings"]["row_tokens"] == facts["longest_row"]
    assert found["device"]["kind"] == "cpu"


def test_an_unknown_architecture_says_so(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (seven_b / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 1024}))
    assert main(["plan", "--model", str(seven_b), "--device-memory", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert "Cannot predict" in out
    assert "'gpt2'" in out


def test_no_torch_with_a_given_device(seven_b: Path) -> None:
    code = (
        "import sys\nfrom chulengo.cli.main import main\n"
        f"assert main(['plan', '--model', {str(seven_b)!r}, '--device-memory', '200GiB']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("text", "size"), [
    ("24GiB", 24 << 30), ("24G", 24 << 30), ("80GB", 80 * 10**9), ("1.5 gib", 3 << 29), ("512M", 512 << 20), ("7", 7),
])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0", "3 XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)


def test_the_config_alone_is_enough(tmp_path: Path, seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(seven_b / "config.json", tmp_path / "config.json")
    words = ["--device-memory", "24GiB", "--json"]
    assert main(["plan", "--model", str(tmp_path), *words]) == 2
    alone = json.loads(capsys.readouterr().out)
    assert main(["plan", "--model", str(seven_b), *words]) == 2
    assert alone["plan"] == json.loads(capsys.readouterr().out)["plan"]
    (tmp_path / "config.json").unlink()
    assert main(["plan", "--model", str(tmp_path), *words]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
