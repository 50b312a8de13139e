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


REFERENCE = ["--set", "model.engine=reference"]


def test_a_run_that_does_not_fit_exits_with_2_and_the_way_out(
    seven_b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", str(seven_b), "--device-memory", "24GiB", "--set", "training.max_seq_tokens=2048"]
    arguments += REFERENCE
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "does not fit, 211%" in captured.out
    assert "speed: not predicted of the reference engine" in captured.out
    assert "This run does not fit: it needs 50.59 GiB, and the planned device has 24.00 GiB free." in captured.err
    assert "--set training.gradient_checkpointing=true" in captured.err
    # what it says to type, typed
    assert main([*arguments, "--set", "training.gradient_checkpointing=true"]) == 0


def test_json_is_one_object_also_when_it_does_not_fit(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(seven_b), "--device-memory", "8GiB", "--json", *REFERENCE]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["engine"] == "reference"
    assert found["policies"] is None
    assert found["smallest_change"][0] == "training.gradient_checkpointing=true"
    assert sum(found["plan"]["parts"].values()) == found["plan"]["device_bytes"]
    assert found["settings"]["row_tokens"] == 4096  # the model's context


def test_the_fast_engine_fills_the_card(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(seven_b), "--device-memory", "24GiB", "--set", "training.max_seq_tokens=2048"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "fast engine: weights stream, activations selective in 22 layers, offload-attention in 10 layers" in out
    assert "kept by the layers" in out
    assert "tokens/s in full micro-batches of 8,192 tokens, at the rates of one H200" in out
    assert "products" in out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == "fast"
    assert found["reason"] is None
    assert found["policies"]["activations"] == {"selective": 22, "offload-attention": 10}
    assert found["rates"]["source"] == "at the rates of one H200"
    assert found["step"]["seconds"] == pytest.approx(sum(found["step"]["parts_s"].values()))
    assert found["step"]["tokens_per_s"] == pytest.approx(8192 / found["step"]["seconds"])
    assert found["plan"]["device_bytes"] <= 24 << 30


def test_the_fast_engines_way_out(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(seven_b), "--device-memory", "6GiB", "--set", "training.max_seq_tokens=2048"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--set training.batch_size=2 --set training.gradient_accumulation=2   (then" in said
    typed = ["--set", "training.batch_size=2", "--set", "training.gradient_accumulation=2"]
    assert main([*arguments, *typed]) == 0
    # what was insisted on is given up first
    kept = ["plan", "--model", str(seven_b), "--device-memory", "16GiB", "--set", "training.max_seq_tokens=2048",
            "--set", "model.activations_policy=keep"]  # fmt: skip
    assert main(kept) == 2
    assert "--set model.activations_policy=auto   (then" in capsys.readouterr().err


def test_a_run_that_the_fast_engine_does_not_cover(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(seven_b), "--device-memory", "200GiB", "--set", "lora.train_head=true",
                 "--set", "training.gradient_checkpointing=true"]  # fmt: skip
    assert main(arguments) == 0
    assert "reference engine: lora.train_head is true" in capsys.readouterr().out
    assert main([*arguments, "--set", "model.engine=fast"]) == 2
    assert "model.engine is fast, which does not cover this run" in capsys.readouterr().err
    assert main([*arguments, "--set", "model.weights_policy=fp8"]) == 2
    assert "model.weights_policy is fp8, which the fast engine alone has" in capsys.readouterr().err


def test_the_time_of_the_run(
    seven_b: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from chulengo.cli import plan

    facts = plan.DataFacts(1000, 500_000, 100_000, 2048, 250, 500)
    monkeypatch.setattr(plan, "_data_facts", lambda config: facts)
    words = ["plan", "--model", str(seven_b), "--data", "x.jsonl", "--device-memory", "48GiB"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["row_tokens"] == 2048
    # micro-batches of 4 x 500 tokens would be bound by launches, 32 layers x 6.6 ms, but for graphs
    assert found["policies"]["graphs"]
    captures = 2 * 32 * 32 * 6.6e-3  # of 32 sizes, first a batch without and then the capture
    assert 0.4 < (found["run_seconds"] - captures) / (250 * 32 * 6.6e-3) < 0.6
    # packs are full, so no graph is taken, whatever these facts say
    words += ["--set", "training.batching=packed", "--set", "training.max_seq_tokens=2048"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["policies"]["graphs"]
    assert found["run_seconds"] == pytest.approx(250 * 32 * 6.6e-3)
    assert main(words) == 0
    assert "the run: about 53 s for 250 steps" in capsys.readouterr().out


def test_rates_are_measured_on_this_machines_gpu(
    seven_b: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from chulengo.kernels import ops
    from chulengo.model import load
    from chulengo.model import plan as door
    from chulengo.model.plan_speed import DeviceRates
    from chulengo.train import bench

    card = door.DeviceMemory("Some GPU", "cuda", 24 << 30, 24 << 30)
    monkeypatch.setattr(door, "device_memory", lambda device: card)
    monkeypatch.setattr(load, "resolve_device", lambda device: device)
    monkeypatch.setattr(ops, "choose", lambda device: ("fused", ""))
    rates = DeviceRates(68e12, 0.428e12, 5.5e9, "at rates measured here")
    monkeypatch.setattr(bench, "measured_rates", lambda device: rates)
    words = ["plan", "--model", str(seven_b), "--set", "training.max_seq_tokens=2048", "--json"]
    assert main([*words, "--device-memory", "24GiB"]) == 0
    usual = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["step"]["seconds"] == pytest.approx(10 * usual["step"]["seconds"])
    assert here["rates"]["source"] == "at rates measured here"
    monkeypatch.setattr(ops, "choose", lambda device: ("reference", "Triton is not installed"))
    assert main([*words, "--set", "training.gradient_checkpointing=true"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "Its kernels do not run here: Triton is not installed."


def test_a_cpus_speed_is_not_predicted(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(seven_b), "--set", "model.device=cpu", "--set", "training.max_seq_tokens=512"]
    assert main([*words, "--device-memory", "400GiB"]) == 0
    out = capsys.readouterr().out
    assert "fast engine: weights resident, activations keep" in out
    assert "speed: not predicted on a CPU" in out


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


def test_a_lower_bound_is_no_promise(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (seven_b / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 1024}))
    words = ["plan", "--model", str(seven_b), "--device-memory", "24GiB"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "24.00 GiB free: cannot say whether it fits" in out
    assert "needs at least " in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is None
    assert main([*words[:-1], "100MiB"]) == 2
    assert "does not fit" in capsys.readouterr().out


def test_a_config_alone_of_an_unknown_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "max_position_embeddings": 8192}))
    words = ["plan", "--model", str(tmp_path), "--device-memory", "24GiB"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "Cannot predict: the architecture 'gemma2'" in said.out
    assert "fits" not in said.out
    assert "Whether this run fits cannot be said" in said.err
    assert f"try:     chulengo plan --model {tmp_path}   (with its *.safetensors in that folder)" in said.err
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["fits"] is None
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    words += ["--set", "lora.targets=[lm_head]"]
    assert main(words) == 2
    assert "try:     --set lora.targets=all-linear" in capsys.readouterr().err


BF16 = "assumed: a GPU that has bfloat16 (compute capability 8.0 and above)"
HOST = "room in the host's memory for what goes there, which was not looked at"


@pytest.mark.parametrize(("memory", "settings", "said"), [
    ("80GiB", [], BF16),
    ("8GiB", [], f"{BF16}, and {HOST}"),
    ("80GiB", ["model.weights_policy=fp8"],
     "assumed: a GPU that has bfloat16 and products in FP8 (compute capability 8.9 and above)"),
    ("80GiB", ["model.engine=reference", "training.optimizer=paged_adamw_8bit"], f"{BF16}, and {HOST}"),
    ("80GiB", ["model.engine=reference", "model.compute_dtype=float16"], None),
    ("400GiB", ["model.device=cpu"], None),
])  # fmt: skip
def test_what_was_assumed_of_a_card_is_said(
    seven_b: Path, capsys: pytest.CaptureFixture[str], memory: str, settings: list[str], said: str | None
) -> None:
    words = ["plan", "--model", str(seven_b), "--device-memory", memory, "--set", "training.max_seq_tokens=2048"]
    words += [word for setting in settings for word in ("--set", setting)]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("assumed")]
    assert lines == ([said] if said else [])
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed"] == said


def test_unquantised_weights_on_a_cpu(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(seven_b), "--device-memory", "400GiB", "--set", "model.device=cpu"]
    assert main([*words, "--set", "model.quantization=none"]) == 0
    out = capsys.readouterr().out
    assert "unquantised weights, float32" in out
    assert "quantised weights " not in out.replace("unquantised weights, ", "")


def test_sizes_without_a_unit(seven_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(seven_b)]
    assert main([*words, "--device-memory", "48"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--device-memory '48' is 48 bytes." in said.err
    assert "try:     --device-memory 48GiB" in said.err
    assert main([*words, "--device-memory", "-5GiB"]) == 2
    assert "--device-memory SIZE   (plan for a GPU with this much free: 24GiB, 80GB)" in capsys.readouterr().err
    for value in ("24", "24.5", '"24"'):
        assert main([*words, "--set", f"model.gpu_memory_limit={value}"]) == 2
        said_of_limit = capsys.readouterr().err
        assert "model.gpu_memory_limit" in said_of_limit
        assert "with its unit, such as " in said_of_limit


def test_no_torch_with_a_given_device(seven_b: Path) -> None:
    code = (
        "import sys\nfrom chulengo.cli.main import main\n"
        f"assert main(['plan', '--model', {str(seven_b)!r}, '--device-memory', '200GiB']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("text", "size"), [
    ("24GiB", 24 << 30), ("24G", 24 << 30), ("80GB", 80 * 10**9), ("1.5 gib", 3 << 29), ("512M", 512 << 20),
    ("25769803776", 24 << 30),
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
    assert main(["plan", "--model", str(tmp_path), *words]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main(["plan", "--model", str(seven_b), *words]) == 0
    assert alone["plan"] == json.loads(capsys.readouterr().out)["plan"]
    (tmp_path / "config.json").unlink()
    assert main(["plan", "--model", str(tmp_path), *words]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
