"""Which engine and which policies, on a card that is not there, and what is said when memory and plan differ."""

from __future__ import annotations

import contextlib
import itertools
import json
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import command_kit
import tiny_models
from chulengo.cli.main import main as cli_main
from chulengo.cli.train import memory_line, print_result
from chulengo.config import load_config
from chulengo.errors import ChulengoError, ConfigError, DoesNotFitError
from chulengo.model import fast as fast_model
from chulengo.model.plan import DeviceMemory, needed_bytes
from chulengo.model.plan_policies import Wanted
from chulengo.train import engine, finetune, trainer
from chulengo.train.coverage import why_not_covered
from chulengo.train.fast_loop import FastLoop
from chulengo.train.no_room import step_advice
from chulengo.train.ranks import Ranks
from chulengo.train.run_folder import RunPaths
from training_kit import assert_equal_tensors, make_llama, make_model, make_rows, train, trained_tensors

GIB = 1 << 30
SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("all-linear",), "rslora": False, "dora": False,
        "train_head": False, "train_embeddings": False}  # fmt: skip
PLAN = {
    "quantization": "nf4", "double_quant": True, "compute_dtype": "auto", "attention": "sdpa", "rank": 16,
    "targets": ("all-linear",), "batch_size": 4, "max_seq_tokens": 2048, "optimizer": "adamw",
    "gradient_checkpointing": False, "precision": "auto", "dropout": 0.0, "gradient_accumulation": 1,
    "batching": "packed",
}  # fmt: skip


def card(monkeypatch: pytest.MonkeyPatch, gib: float, capability: tuple[int, int] = (9, 0)) -> None:
    """Lets the engine see a GPU of this size."""
    memory = DeviceMemory("Some GPU", "cuda", int(gib * GIB), int(gib * GIB), capability=capability)
    monkeypatch.setattr(engine, "device_memory", lambda device: memory)
    monkeypatch.setattr(engine, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(engine, "resolve_dtype", lambda name, place: torch.bfloat16)
    monkeypatch.setattr(engine, "resolve_precision", lambda name, place: "bf16")
    monkeypatch.setattr(engine.ops, "choose", lambda place: ("fused", "here"))


def chosen(
    wanted: str = "auto", policies: Wanted | None = None, lora: dict[str, Any] | None = None, **changes: Any
) -> engine.EngineChoice:
    return engine.choose_engine(
        wanted, SEVEN_B, policies=policies or Wanted(), lora=LORA | (lora or {}), longest_row=2048,
        plan=PLAN | changes, device="cuda",
    )  # fmt: skip


def test_auto_fills_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24)
    choice = chosen()
    choice.check_room()
    assert choice.found is not None
    assert (choice.engine, choice.compute_dtype, choice.precision) == ("fast", "bfloat16", "bf16")
    assert choice.found.policies.activations == ("selective",) * 22 + ("offload-attention",) * 10
    # what differs by layer is left to the next plan: it changes no number
    assert choice.settings() == {
        "compute_dtype": "bfloat16", "engine": "fast", "weights_policy": "stream", "activations_policy": "auto",
        "embeddings_policy": "device", "graphs": "never",
    }  # fmt: skip
    card(monkeypatch, 139)
    assert chosen().settings()["activations_policy"] == "keep"
    assert chosen(batch_size=1).settings()["graphs"] == "always"
    assert chosen(policies=Wanted(graphs="never"), batch_size=1).settings()["graphs"] == "never"
    assert chosen(gradient_checkpointing=True).settings()["activations_policy"] == "offload-attention"


def test_what_does_not_fit_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 6)
    with pytest.raises(DoesNotFitError, match=r"Some GPU has 6.00 GiB free") as caught:
        chosen().check_room()
    assert caught.value.next_step is not None
    assert "--set training.batch_size=2 --set training.gradient_accumulation=2" in caught.value.next_step
    chosen(batch_size=2, gradient_accumulation=2).check_room()


def test_a_tight_plan_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By train as by plan, in one and the same line."""
    card(monkeypatch, 5.9)
    found = chosen(batch_size=2).found
    assert found is not None
    assert needed_bytes(found.plan) <= 5.9 * GIB < found.plan.device_bytes
    said: list[str] = []
    chosen(batch_size=2).check_room(say=said.append)
    card(monkeypatch, 139)
    chosen(batch_size=2).check_room(say=said.append)
    assert len(said) == 1
    assert "Some GPU has 5.90 GiB free: fits, " in said[0]
    assert said[0].endswith("(tight: the allocator will have to give back its slack)")

    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    words = ["plan", "--model", str(tmp_path), "--device-memory", "5.9GiB", "--set", "training.max_seq_tokens=2048"]
    assert cli_main([*words, "--set", "training.batch_size=2"]) == 0
    assert said[0].replace("Some GPU", "the planned device") in capsys.readouterr().out.splitlines()

    data = command_kit.write_lines(tmp_path / "talks.jsonl", *command_kit.conversations(24))
    folder = tiny_models.write_model_folder(tmp_path / "llama", max_position_embeddings=512)
    settings = [f"model.name={folder}", f"data.train={data}", "training.max_steps=1", "model.cpu_threads=1",
                "training.max_seq_tokens=320", "training.overlong=drop", "data.validation_fraction=0",
                f"out={tmp_path / 'run'}"]  # fmt: skip
    monkeypatch.undo()
    right, heard = finetune.engine_for, []

    def tight(*arguments: Any) -> engine.EngineChoice:
        return replace(right(*arguments), check_room=lambda say: say("tight"))

    monkeypatch.setattr(finetune, "engine_for", tight)
    finetune.finetune(load_config(None, settings), message=heard.append)
    assert "tight" in heard


def test_the_reference_engine_takes_no_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24)
    for choice in (chosen("reference"), chosen(quantization="fp4"), chosen(attention="eager")):
        assert choice.engine == "reference"
        assert choice.found is None
        assert choice.settings()["weights_policy"] == choice.settings()["graphs"] == "auto"
    with pytest.raises(ConfigError, match="On a GPU it attends in 16 bits only"):
        chosen("fast", compute_dtype="float32")
    monkeypatch.setattr(engine.ops, "choose", lambda place: ("reference", "Triton is not installed"))
    assert chosen().reason == "Its kernels do not run here: Triton is not installed."


@pytest.mark.parametrize(
    ("model", "lora", "said"),
    [
        ({}, {"rank": 129}, "rank is 129"), ({}, {"rank": 129, "dora": True}, "rank is 129"),
        ({"head_dim": 264}, {}, "head size is 264"), ({"head_dim": 100}, {"dropout": 0.1}, "head size is 100"),
        ({"intermediate_size": 11004}, {}, "down_proj takes 11,004"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take_goes_to_the_reference_engine(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], lora: dict[str, Any], said: str
) -> None:
    card(monkeypatch, 139)
    for name, value in model.items():
        monkeypatch.setitem(SEVEN_B, name, value)
    choice = chosen(lora=lora)
    assert choice.engine == "reference"
    assert said in str(choice.reason)
    with pytest.raises(ConfigError, match=said) as caught:
        chosen("fast", lora=lora)
    assert caught.value.next_step == "--set model.engine=reference"


def test_what_another_form_takes_stays_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 139)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    assert chosen(lora={"rank": 128}).engine == "fast"
    assert chosen(lora={"rank": 256, "dropout": 0.1}).engine == "fast"
    assert chosen(lora={"rank": 256}, quantization="none").engine == "fast"
    assert chosen(policies=Wanted("fp8"), lora={"rank": 256}).engine == "fast"
    for lora, said in (({"dropout": 0.1}, "dropout 0.1"), ({"dora": True}, "lora.dora")):
        with pytest.raises(ConfigError, match=rf"Products in FP8 take no adapter with {said}"):
            chosen(policies=Wanted("fp8"), lora=lora)
    monkeypatch.setitem(SEVEN_B, "intermediate_size", 53248)  # Llama 3.1 405B
    with pytest.raises(ConfigError, match=r"intermediate_size: 53,248 features") as caught:
        chosen(policies=Wanted("fp8"))
    assert caught.value.next_step == "--set model.weights_policy=auto"


def test_fp8_is_never_dropped_for_the_reference_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 139)
    assert chosen(policies=Wanted("fp8")).settings()["weights_policy"] == "resident-fp8"
    with pytest.raises(ConfigError, match=r"fp8, which the fast engine alone has.*attention is eager") as caught:
        chosen(policies=Wanted("fp8"), attention="eager")
    assert caught.value.next_step is not None
    assert caught.value.next_step.startswith("--set model.weights_policy=auto")


def test_fp8_where_the_gpu_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 139)
    monkeypatch.setitem(SEVEN_B, "intermediate_size", 11000)
    with pytest.raises(ConfigError, match=r"intermediate_size of 11000 features"):
        chosen(policies=Wanted("stream-fp8"))
    chosen(policies=Wanted("stream"))
    monkeypatch.setitem(SEVEN_B, "intermediate_size", 11008)
    card(monkeypatch, 139, (8, 6))
    with pytest.raises(ConfigError, match=r"Some GPU has no products in FP8"):
        chosen(policies=Wanted("stream-fp8"))


def test_what_cannot_be_had_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 139)
    monkeypatch.setitem(SEVEN_B, "tie_word_embeddings", True)
    with pytest.raises(ConfigError, match="the model's head is the same table"):
        chosen(policies=Wanted(embeddings="host"))


def test_the_model_gets_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = make_llama(tmp_path / "llama"), {}
    right = fast_model.load_fast

    def seen(*arguments: Any, **values: Any) -> Any:
        asked.update(values)
        return right(*arguments, **values | {"graphs": False})

    monkeypatch.setattr(fast_model, "load_fast", seen)
    config = json.loads((folder / "config.json").read_text())
    choice = engine.choose_engine(
        "fast", config, policies=Wanted("stream", "offload", "host"), lora=LORA, longest_row=64,
        plan=PLAN | {"max_seq_tokens": 64}, device="cpu",
    )
    assert choice.found is not None
    mixed = replace(choice.found, policies=replace(
        choice.found.policies, activations=("selective", "offload"), graphs=True
    ))  # fmt: skip
    model, facts = engine.load_model(
        replace(choice, found=mixed), folder, lora=LORA, seed=0, quantization="nf4", double_quant=True, device="cpu",
        attention="sdpa", cpu_threads=1, longest_row=64, name="tiny", vocab_size=100,
    )
    assert (asked["weights"], asked["activations"]) == ("stream", ("selective", "offload"))
    assert (asked["embeddings"], asked["graphs"]) == ("host", True)
    assert "activations selective: 1 layers, offload: 1 layers" in engine.describe_engine(facts)
    assert model.device.type == "cpu"


def test_no_memory_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **values: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card(monkeypatch, 24)
    choice = chosen()
    monkeypatch.setattr(fast_model, "load_fast", full)
    with pytest.raises(DoesNotFitError, match=r"cuda:0 has no room for the weights of seven-b, though \d+\.\d\d GiB"):
        engine.load_model(
            choice, tmp_path, lora=LORA, seed=0, quantization="nf4", double_quant=True, device="cuda",
            attention="sdpa", cpu_threads=None, longest_row=64, name="seven-b", vocab_size=100,
        )


def test_no_memory_for_a_step_says_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, batch: Any, *, refold: bool = True) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make_model(make_llama(tmp_path / "llama"), engine="fast")
    monkeypatch.setattr(type(model), "nll", full)
    monkeypatch.setattr(trainer, "peak_bytes", lambda device: 8 * GIB)
    with pytest.raises(DoesNotFitError, match=r"8.00 GiB were in use at most, 7.00 GiB were planned\."):
        train(model, tmp_path / "run", make_rows(8), planned_bytes=7 * GIB)
    with pytest.raises(DoesNotFitError, match=r"8.00 GiB were in use at most\."):
        train(model, tmp_path / "other", make_rows(8))


def test_measured_against_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = command_kit.write_lines(tmp_path / "talks.jsonl", *command_kit.conversations(24))
    folder = tiny_models.write_model_folder(tmp_path / "llama", max_position_embeddings=512)
    settings = [f"model.name={folder}", f"data.train={data}", "training.max_steps=1", "model.cpu_threads=1",
                "training.max_seq_tokens=320", "training.overlong=drop", "data.validation_fraction=0"]  # fmt: skip
    on_cpu = finetune.finetune(load_config(None, [*settings, f"out={tmp_path / 'a'}"]), message=lambda _: None)
    assert on_cpu.planned_peak_bytes is None  # a process, not tensors
    print_result(on_cpu)
    assert "Peak memory" not in capsys.readouterr().out
    right = finetune._check_room

    def on_gpu(*arguments: Any) -> Any:
        return replace(right(*arguments), device="cuda")

    monkeypatch.setattr(finetune, "_check_room", on_gpu)
    result = finetune.finetune(load_config(None, [*settings, f"out={tmp_path / 'b'}"]), message=lambda _: None)
    stored = json.loads((result.paths.root / "result.json").read_text())
    assert stored["planned_peak_bytes"] == result.planned_peak_bytes
    assert stored["planned_peak_bytes"] > 0
    print_result(result)
    assert "Peak memory: " in capsys.readouterr().out


def test_a_plan_that_was_too_low_is_seen() -> None:
    assert memory_line(5 * GIB, 5 * GIB) == "Peak memory: 5.00 GiB measured, 5.00 GiB planned for full rows."
    assert "the plan was too low" in memory_line(6 * GIB, 5 * GIB)


def test_gradients_are_dropped_and_not_zeroed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what zeroing one buffer gave."""
    folder, rows, found = make_llama(tmp_path / "llama"), make_rows(24), []

    right = FastLoop._backward

    def zeroed(self: FastLoop, current: Any) -> Any:
        if self.parameter.grad is not None:
            self.parameter.grad.zero_()
        return right(self, current)

    for name in ("dropped", "zeroed"):
        model = make_model(folder, engine="fast")
        if name == "zeroed":
            monkeypatch.setattr(FastLoop, "_backward", zeroed)
            monkeypatch.setattr(type(model), "clear_gradients", lambda self: None)
        _, metrics = train(model, tmp_path / name, rows, gradient_accumulation=3, epochs=2.0)
        found.append(([row["grad_norm"] for row in metrics if row["kind"] == "train"], trained_tensors(model)))
        if name == "dropped":
            assert all(parameter.grad is None for parameter in model.named_parameters().values())
    assert found[0][0] == found[1][0]
    assert_equal_tensors(found[0][1], found[1][1])


def test_a_step_without_rows_has_a_gradient_of_zeros(tmp_path: Path) -> None:
    model = make_model(make_llama(tmp_path / "llama"), engine="fast")
    model.clear_gradients()
    model.zero_gradients()
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.named_parameters().values())
    (flat,) = model.trainable_parameters()
    assert flat.grad is not None
    nll, count = model.nll({"input_ids": torch.tensor([[1, 5, 9]]), "labels": torch.tensor([[-100, 5, 9]]),
                            "attention_mask": torch.ones(1, 3, dtype=torch.long)})  # fmt: skip
    nll.backward()
    before = flat.grad.clone()
    model.zero_gradients()  # what is there stays
    assert torch.equal(flat.grad, before)
    assert count == 2
    assert float(before.abs().sum()) > 0


@pytest.mark.parametrize("allowed", [True, False])
def test_out_of_memory_in_step_1_begins_again_leaner_if_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    data = command_kit.write_lines(tmp_path / "talks.jsonl", *command_kit.conversations(24))
    folder = tiny_models.write_model_folder(tmp_path / "llama", max_position_embeddings=512)
    settings = [f"model.name={folder}", f"data.train={data}", "training.max_steps=2", "model.cpu_threads=1",
                "training.max_seq_tokens=320", "training.overlong=drop", "data.validation_fraction=0.1",
                f"model.retry_leaner={str(allowed).lower()}"]  # fmt: skip
    right, tried = fast_model.FastModel.nll, []

    def full_when_keeping(self: Any, batch: Any, *, refold: bool = True) -> Any:
        if self.training and self.describe()["activations"].startswith("keep"):
            tried.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert all(model() is None for model in tried), "the model that was too large is still there"
        return right(self, batch, refold=refold)

    monkeypatch.setattr(fast_model.FastModel, "nll", full_when_keeping)
    said: list[str] = []
    config = load_config(None, [*settings, f"out={tmp_path / 'run'}"])
    if not allowed:
        with pytest.raises(DoesNotFitError) as caught:
            finetune.finetune(config, message=said.append)
        assert "model.retry_leaner=true" in str(caught.value.next_step)
        return
    result = finetune.finetune(config, message=said.append)
    assert len(tried) == 1
    assert [line for line in said if "Beginning again, weights resident, activations full." in line]
    assert result.outcome.steps == 2
    stored = load_config(result.paths.config, saved=True)
    assert stored.model.activations_policy == "full"
    manifest = json.loads(result.paths.manifest.read_text())
    assert manifest["engine"]["activations"].startswith("full")
    config = load_config(None, [*settings, "model.activations_policy=full", f"out={tmp_path / 'b'}"])
    usual = finetune.finetune(config, message=said.append)
    adapters = [run.paths.adapter / "adapter_model.safetensors" for run in (result, usual)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_leaner_policies_need_a_tenth_less(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24)
    choice, seen = chosen(), []
    while choice is not None and choice.found is not None:
        seen.append(needed_bytes(choice.found.plan))
        choice = choice.leaner()
    assert len(seen) > 3
    assert all(less <= 0.9 * more for more, less in itertools.pairwise(seen))


def test_no_memory_for_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def attach_lora(self, **_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    card(monkeypatch, 24)
    choice = chosen()
    monkeypatch.setattr(fast_model, "load_fast", lambda *_, **__: Full())
    with pytest.raises(DoesNotFitError, match=r"cuda:0 has no room for seven-b with its adapter, though \d+\.\d\d GiB"):
        engine.load_model(
            choice, tmp_path, lora=LORA, seed=0, quantization="nf4", double_quant=True, device="auto",
            attention="sdpa", cpu_threads=None, longest_row=64, name="seven-b", vocab_size=100,
        )


def small_run(tmp_path: Path, *more: str) -> list[str]:
    data = command_kit.write_lines(tmp_path / "talks.jsonl", *command_kit.conversations(24))
    folder = tiny_models.write_model_folder(tmp_path / "llama", max_position_embeddings=512)
    return [f"model.name={folder}", f"data.train={data}", "training.max_steps=3", "model.cpu_threads=1",
            "training.max_seq_tokens=320", "training.overlong=drop", "data.validation_fraction=0", *more]  # fmt: skip


def test_only_the_first_step_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_run(tmp_path, "model.retry_leaner=true", "training.log_every_steps=10", f"out={tmp_path / 'run'}")
    right, calls = FastLoop._backward, []

    def full_at_step_2(self: Any, current: Any) -> Any:
        calls.append(self.step)
        if self.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, current)

    monkeypatch.setattr(FastLoop, "_backward", full_at_step_2)
    with pytest.raises(DoesNotFitError) as caught:
        finetune.finetune(load_config(None, settings), message=lambda _: None)
    assert calls == [0, 1]
    assert "retry_leaner" not in str(caught.value.next_step)
    assert str(caught.value.next_step).startswith("--set ")


def test_settings_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = small_run(tmp_path, "model.attention=eager", "model.activations_policy=full", "model.retry_leaner=true",
                      "model.embeddings_policy=host", f"out={tmp_path / 'run'}")  # fmt: skip
    said: list[str] = []
    finetune.finetune(load_config(None, given), message=said.append)
    (line,) = [each for each in said if each.startswith("engine:")]
    assert "does not cover this run. model.attention is eager" in line
    effect = ("Without effect there: model.activations_policy=full, model.embeddings_policy=host, "
              "model.retry_leaner=true")  # fmt: skip
    assert effect in line
    assert cli_main(["train", "--dry-run", *(word for each in given[:-1] for word in ("--set", each))]) == 0
    assert effect in capsys.readouterr().out
    said.clear()
    finetune.finetune(load_config(None, [*small_run(tmp_path), f"out={tmp_path / 'b'}"]), message=said.append)
    assert not [each for each in said if "Without effect" in each]


def test_retry_leaner_of_several_processes_is_said_to_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(ChulengoError):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Stop("enough")

    monkeypatch.setattr(finetune, "_train_or_leaner", stop)
    monkeypatch.setattr(finetune, "joined", lambda: contextlib.nullcontext(Ranks(0, 2)))
    monkeypatch.setattr(finetune, "opened_folder", lambda out, **_: contextlib.nullcontext(RunPaths(Path(out))))
    for index, (given, expected) in enumerate((("true", 1), ("false", 0))):
        out = tmp_path / str(index)
        out.mkdir()
        said: list[str] = []
        config = load_config(None, small_run(tmp_path, f"model.retry_leaner={given}", f"out={out}"))
        with pytest.raises(Stop):
            finetune.finetune(config, message=said.append)
        assert len([each for each in said if "retry_leaner does nothing in a run of 2 processes" in each]) == expected


SITUATION: dict[str, Any] = {
    "fast": True, "activations": "auto", "retries": False, "processes": 1, "recomputes": False, "batch_size": 4,
    "gradient_accumulation": 2, "max_seq_tokens": 2048, "resumed": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("situation", "says", "never"),
    [
        ({}, ["--set model.retry_leaner=true", "--set training.batch_size=1 --set training.gradient_accumulation=8",
              "--set training.max_seq_tokens=1024", "chulengo plan"], ["checkpointing", "activations_policy"]),
        ({"retries": True, "batch_size": 1}, ["max_seq_tokens"], ["retry_leaner", "batch_size"]),
        ({"activations": "keep"}, ["--set model.activations_policy=auto"], ["checkpointing"]),
        ({"processes": 2}, ["--set model.activations_policy=offload"], ["retry_leaner"]),
        ({"fast": False}, ["--set training.gradient_checkpointing=true"], ["model."]),
        ({"fast": False, "recomputes": True}, ["batch_size"], ["checkpointing"]),
        ({"resumed": "a run", "activations": "keep"},
         ["chulengo train --resume 'a run' --set model.activations_policy=auto"], ["batch_size", "max_seq", "plan"]),
        ({"resumed": "run", "fast": False}, ["make room on the device, then chulengo train --resume run"], ["--set"]),
    ],
)  # fmt: skip
def test_advice_of_a_step_without_room(situation: dict[str, Any], says: list[str], never: list[str]) -> None:
    advice = step_advice(**SITUATION | situation)
    assert not [part for part in says if part not in advice], advice
    assert not [part for part in never if part in advice], advice


RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("llama2_7b_*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_leave_recomputing_to_the_plan_where_the_fast_engine_trains(file: Path) -> None:
    config = load_config(file)
    reason = why_not_covered(
        SEVEN_B, lora=asdict(config.lora), longest_row=1024, plan=finetune.plan_settings(config, 1024), kind="cuda",
        has_bf16=True,
    )
    assert config.training.gradient_checkpointing == (reason is not None), reason


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 9
