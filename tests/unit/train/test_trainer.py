from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from chulengo.errors import ConfigError, MissingPackageError, TrainingError
from chulengo.model.adapter import load_adapter, save_adapter
from chulengo.model.load import load_base
from chulengo.model.loss import supervised_nll
from chulengo.train.checkpoint import newest_good, steps
from chulengo.train.trainer import Interrupted, RunShape, run_training
from training_kit import (
    SETTINGS,
    assert_equal_tensors,
    make_llama,
    make_model,
    make_rows,
    make_t5,
    train,
    trained_tensors,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["reference", "fast"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ROWS = make_rows(22)
VALIDATION = make_rows(6, seed=1)


def test_rows_outcome_and_files_of_a_run(
    llama: Path, engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model(llama, engine=engine, dropout=0.1)
    shapes: list[RunShape] = []
    capfd.readouterr()
    outcome, rows = train(model, tmp_path, ROWS, VALIDATION)
    assert capfd.readouterr() == ("", "")
    training = [r for r in rows if r["kind"] == "train"]
    validation = [r for r in rows if r["kind"] == "validation"]
    assert [r["step"] for r in training] == list(range(1, 13))
    assert [r["step"] for r in validation] == [0, 6, 12]  # step 0: the base, to be beaten
    assert outcome.steps == outcome.shape.total_steps == 12
    assert sum(r["tokens"] for r in training) == outcome.tokens == 2 * sum(len(row.ids) for row in ROWS)
    targets = sum(sum(row.trained[1:]) for row in ROWS)
    assert sum(r["supervised_tokens"] for r in training[:6]) == targets
    assert training[-1]["loss"] < training[0]["loss"]
    assert validation[-1]["loss"] == outcome.last_validation_loss
    assert validation[-1]["perplexity"] == pytest.approx(math.exp(validation[-1]["loss"]))
    assert training[0]["learning_rate"] == 0.0
    assert max(r["learning_rate"] for r in training) == SETTINGS["learning_rate"]
    assert all(r["peak_bytes"] > 0 and r["tokens_per_s"] > 0 and r["grad_norm"] > 0 for r in training)
    assert not shapes
    assert steps(tmp_path / "checkpoints") == [6, 12]
    assert not model.training
    json.dumps(rows)


def test_validation_is_summed_loss_by_summed_tokens(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama, dropout=0.5)  # evaluation has none
    outcome, rows = train(model, tmp_path, ROWS, VALIDATION, epochs=1.0)
    from chulengo.data.batches import collate_padded

    total = count = 0.0
    with torch.no_grad():
        for row in VALIDATION:
            nll, tokens = supervised_nll(model, collate_padded([row], pad_id=0))
            total, count = total + float(nll), count + tokens
    last = next(r for r in reversed(rows) if r["kind"] == "validation")
    assert last["supervised_tokens"] == count
    assert last["loss"] == pytest.approx(total / count, rel=1e-6)
    assert outcome.kept_step == outcome.steps


def test_only_the_adapter_changes(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trained_tensors(model)
    train(model, tmp_path, ROWS, epochs=1.0)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all(not torch.equal(after[n], p) for n, p in before.items())


def test_result_is_loadable_by_plain_peft(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    train(model, tmp_path, ROWS, epochs=1.0)
    save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    for folder in (tmp_path / "adapter", tmp_path / "checkpoints" / "checkpoint-6"):
        plain = peft.PeftModel.from_pretrained(load_base(llama, device="cpu"), str(folder)).eval()
        assert torch.equal(plain(ids).logits, expected)
    assert torch.equal(load_adapter(load_base(llama, device="cpu"), tmp_path / "adapter")(ids).logits, expected)


def test_keep_best_returns_the_best_and_not_the_last(llama: Path, engine: str, tmp_path: Path) -> None:
    # a learning rate that overfits random rows within a few epochs
    changes: dict[str, Any] = {"epochs": 6.0, "learning_rate": 3e-2, "keep_checkpoints": 1}
    model = make_model(llama, engine=engine)
    outcome, rows = train(model, tmp_path, ROWS, VALIDATION, **changes)
    losses = {r["step"]: r["loss"] for r in rows if r["kind"] == "validation" and r["step"] > 0}
    best = min(losses, key=lambda s: losses[s])
    assert best < outcome.steps, "the case is too easy to show anything"
    assert outcome.best_step == outcome.kept_step == best
    assert outcome.best_loss == losses[best]
    assert set(steps(tmp_path / "checkpoints")) == {best, outcome.steps}
    saved = load_file(tmp_path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert_equal_tensors(
        {n.replace(".default", ""): p for n, p in trained_tensors(model).items()}, saved
    )
    last = make_model(llama, engine=engine)
    outcome, _ = train(last, tmp_path / "last", ROWS, VALIDATION, keep_best=False, **changes)
    assert outcome.kept_step == outcome.steps
    assert steps(tmp_path / "last" / "checkpoints") == [outcome.steps]


def test_early_stopping(llama: Path, engine: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 20.0, "learning_rate": 3e-2, "early_stopping_patience": 2}
    outcome, rows = train(make_model(llama, engine=engine), tmp_path, ROWS, VALIDATION, **changes)
    losses = [r["loss"] for r in rows if r["kind"] == "validation" and r["step"] > 0]
    assert outcome.stopped_early
    assert outcome.steps < outcome.shape.total_steps
    assert losses.index(min(losses)) == len(losses) - 3
    # resuming a run that stopped early trains no further
    again = make_model(llama, engine=engine)
    resumed, more = train(again, tmp_path, ROWS, VALIDATION, resume=True, **changes)
    assert not more
    assert (resumed.steps, resumed.kept_step, resumed.stopped_early) == (outcome.steps, outcome.kept_step, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"batching": "padded"}, {"batching": "packed"}, {"optimizer": "adamw_8bit"}, {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "paged_adamw_32bit"}, {"precision": "bf16"}, {"gradient_checkpointing": True},
        {"schedule": "constant"}, {"schedule": "linear"}, {"schedule": "constant_with_warmup"},
        {"schedule": "polynomial"}, {"schedule": "inverse_sqrt"}, {"weight_decay": 0.1}, {"max_grad_norm": 0.0},
        {"warmup_steps": 3}, {"max_steps": 5}, {"log_every_steps": 3, "eval_every_steps": 2, "save_every_steps": 3},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_each_setting_trains(llama: Path, engine: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    # the fast engine has no autocast: its model computes in what `precision` says, or the run is refused
    dtype = "bfloat16" if engine == "fast" and changes.get("precision") == "bf16" else "auto"
    model = make_model(llama, engine=engine, dropout=0.05, compute_dtype=dtype)
    outcome, rows = train(model, tmp_path, ROWS, VALIDATION, **changes)
    training = [r for r in rows if r["kind"] == "train"]
    validation = [r["step"] for r in rows if r["kind"] == "validation"]
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert all(p.isfinite().all() for p in trained_tensors(model).values())
    if "max_steps" in changes:
        assert outcome.steps == training[-1]["step"] == 5
        assert validation == [0, 5]
    elif "log_every_steps" in changes:
        assert [r["step"] for r in training] == [3, 6, 9, 12]
        assert validation == [0, 2, 4, 6, 8, 10, 12]
    else:
        assert training[-1]["loss"] < training[0]["loss"]
    if changes.get("batching") == "packed":
        assert outcome.shape.packing_efficiency is not None
        assert outcome.shape.packing_efficiency > 0.8
    if "warmup_steps" in changes:
        assert [r["learning_rate"] for r in training[:4]] == pytest.approx([0, 5e-3 / 3, 5e-3 * 2 / 3, 5e-3])


@pytest.mark.parametrize("quantization", ["int8", "fp4", "none"])
def test_each_quantisation_trains(llama: Path, tmp_path: Path, quantization: str) -> None:
    outcome, rows = train(make_model(llama, quantization=quantization), tmp_path, ROWS, epochs=3.0)
    losses = [r["loss"] for r in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert outcome.best_step is None


@pytest.mark.parametrize("lora", [{"dora": True}, {"train_head": True}, {"train_embeddings": True}])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_other_trainable_parts_train(llama: Path, tmp_path: Path, lora: dict[str, bool], precision: str) -> None:
    model = make_model(llama, **lora)
    before = trained_tensors(model)
    train(model, tmp_path, ROWS, epochs=1.0, precision=precision)
    assert all(not torch.equal(p, before[n]) for n, p in trained_tensors(model).items())


@pytest.mark.parametrize("batching", ["padded", "group_by_length"])
def test_encoder_decoder_trains(tmp_path: Path, batching: str) -> None:
    model = make_model(make_t5(tmp_path / "t5"))
    outcome, rows = train(
        model, tmp_path / "run", make_rows(12, encoder=True), make_rows(4, seed=2, encoder=True), batching=batching,
        epochs=8.0,
    )
    training = [r["loss"] for r in rows if r["kind"] == "train"]
    assert sum(training[-3:]) < sum(training[:3])
    assert outcome.last_validation_loss is not None


def test_encoder_decoder_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be packed"):
        train(make_model(make_t5(tmp_path / "t5")), tmp_path, make_rows(4, encoder=True), batching="packed")


def test_int8_cannot_be_packed(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 weights cannot be packed"):
        train(make_model(llama, quantization="int8"), tmp_path, ROWS, batching="packed")


def test_a_model_that_ignores_positions_cannot_be_packed(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    base = model.get_base_model()
    forward = base.model.forward
    base.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ConfigError, match="cannot be packed exactly"):
        train(model, tmp_path, ROWS, batching="packed")


def test_nan_stops_the_run_and_saves_the_batch(llama: Path, engine: str, tmp_path: Path) -> None:
    model = make_model(llama, engine=engine)
    before: dict[str, torch.Tensor] = {}

    def poison(row: dict[str, Any]) -> None:
        before.update(trained_tensors(model))
        if row["step"] == 3:
            with torch.no_grad():
                table = model.weights.embedding_VD if engine == "fast" else model.get_input_embeddings().weight
                table[ROWS[5].ids[2]] = float("nan")

    with pytest.raises(TrainingError) as caught:
        train(model, tmp_path, ROWS, epochs=4.0, sinks=[poison], batch_size=1)
    text = str(caught.value)
    assert "nan" in text
    assert "rows.jsonl:" in text
    folder = next(tmp_path.glob("bad_batch-step*"))
    info = json.loads((folder / "batch.json").read_text())
    tensors = load_file(folder / "batch.safetensors")
    token = ROWS[5].ids[2]
    assert any(token in t.tolist()[0] for n, t in tensors.items() if n.endswith("input_ids"))
    assert info["rows"]
    assert_equal_tensors(trained_tensors(model), before)  # not updated with it


def test_a_parameter_out_of_reach_is_named(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(TrainingError, match=r"1 trainable tensor.*no gradient at step 1.*stray"):
        train(model, tmp_path, ROWS)


def test_a_parameter_with_zero_gradients_is_named_after_warmup(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.scaling["default"] = 0.0  # its gradients are exactly zero
    with pytest.raises(TrainingError) as caught:
        train(model, tmp_path, ROWS, warmup_steps=2)
    text = str(caught.value)
    assert "2 trainable tensor(s)" in text
    assert "layers.1.mlp.up_proj" in text
    assert "exactly zero in all 5 steps" in text  # learning rate 0 at step 1, three steps that move, judged at the next


@pytest.mark.parametrize(
    ("batching", "lora"),
    [("group_by_length", {"dropout": 0.2}), ("packed", {"dropout": 0.2}), ("packed", {"dora": True})],
)
def test_resume_is_bit_equal_to_going_straight(
    llama: Path, engine: str, tmp_path: Path, batching: str, lora: dict[str, Any]
) -> None:
    rows = make_rows(37)
    changes: dict[str, Any] = {"batching": batching, "save_every_steps": 2, "epochs": 3.0, "log_every_steps": 3}
    straight = make_model(llama, engine=engine, **lora)
    outcome, expected = train(straight, tmp_path / "straight", rows, VALIDATION, **changes)

    class Crash(Exception):
        pass

    def crash_at(step: int) -> Any:
        def sink(row: dict[str, Any]) -> None:
            if row["step"] >= step:
                raise Crash

        return sink

    seen: list[dict[str, Any]] = []
    for crash in (4, 8):  # in the first epoch and in the second
        with pytest.raises(Crash):
            train(
                make_model(llama, engine=engine, seed=1, **lora), tmp_path / "run", rows, VALIDATION,
                resume=crash > 4, sinks=[seen.append, crash_at(crash)], **changes,
            )
    model = make_model(llama, engine=engine, seed=1, **lora)
    torch.manual_seed(99)  # whatever the process did before must not matter
    resumed, rest = train(model, tmp_path / "run", rows, VALIDATION, resume=True, **changes)
    assert resumed.steps == outcome.steps
    assert 0 < resumed.shape.first_step < resumed.steps
    assert_equal_tensors(trained_tensors(model), trained_tensors(straight))
    merged = {(r["kind"], r["step"]): r["loss"] for r in [*seen, *rest]}
    assert merged == {(r["kind"], r["step"]): r["loss"] for r in expected}


def test_resume_passes_over_a_damaged_checkpoint(llama: Path, engine: str, tmp_path: Path) -> None:
    straight = make_model(llama, engine=engine, dropout=0.1)
    train(straight, tmp_path / "a", ROWS, save_every_steps=4, keep_checkpoints=3)
    damaged = tmp_path / "a" / "checkpoints" / "checkpoint-12" / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-10] ^= 4
    damaged.write_bytes(content)
    messages: list[str] = []
    model = make_model(llama, engine=engine, dropout=0.1)
    run_training(
        model, ROWS, [], out=tmp_path / "a", **{**SETTINGS, "save_every_steps": 4, "keep_checkpoints": 3},
        resume=True, message=messages.append,
    )
    assert "checkpoint-12 is damaged" in messages[0]
    assert_equal_tensors(trained_tensors(model), trained_tensors(straight))


def test_resume_with_other_settings_or_rows_is_refused(llama: Path, engine: str, tmp_path: Path) -> None:
    train(make_model(llama, engine=engine), tmp_path, ROWS, max_steps=2, settings={"lora.rank": 4})
    for change, name in (
        ({"learning_rate": 1e-3}, "learning_rate: 0.005 -> 0.001"), ({"max_steps": 9}, "max_steps: 2 -> 9"),
        ({"settings": {"lora.rank": 8}}, "lora.rank: 4 -> 8"), ({"seed": 4}, "seed: 3 -> 4"),
    ):
        with pytest.raises(TrainingError) as caught:
            train(
                make_model(llama, engine=engine), tmp_path, ROWS, resume=True,
                **{"max_steps": 2, "settings": {"lora.rank": 4}, **change},
            )
        assert name in str(caught.value)
    with pytest.raises(TrainingError, match=r"rows\.train"):
        train(
            make_model(llama, engine=engine), tmp_path, ROWS[1:], resume=True, max_steps=2, settings={"lora.rank": 4}
        )
    # how often to log or save is no part of what a run computes
    train(
        make_model(llama, engine=engine), tmp_path, ROWS, resume=True, max_steps=2, settings={"lora.rank": 4},
        log_every_steps=2, save_every_steps=1,
    )


def test_nothing_to_resume(llama: Path, engine: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        train(make_model(llama, engine=engine), tmp_path, ROWS, resume=True)


@pytest.mark.parametrize(
    ("engine", "left"),
    [("reference", 2_000), ("reference", 60_000), ("reference", 120_000), ("fast", 2_000), ("fast", 60_000)],
)
def test_a_disk_that_fills_up_in_mid_save_costs_nothing(
    llama: Path, tmp_path: Path, engine: str, left: int
) -> None:
    # where it fills up decides which library notices: safetensors, torch or Python
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        model = make_model(llama, engine=engine, dropout=0.1)

        def fill(row: dict[str, Any]) -> None:
            if row["step"] == 9:
                (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))

        with pytest.raises(TrainingError, match="disk is full") as caught:
            train(model, disk / "run", ROWS, sinks=[fill])
        assert "checkpoint-6 is untouched" in str(caught.value)
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["checkpoint-6"]
        (disk / "ballast").unlink()
        model = make_model(llama, engine=engine, dropout=0.1)
        outcome, _ = train(model, disk / "run", ROWS, resume=True)
        assert outcome.steps == 12
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # the failed writer may still hold a file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_the_run_goes_on_from_there(
    llama: Path, engine: str, tmp_path: Path, number: int
) -> None:
    straight = make_model(llama, engine=engine, dropout=0.1)
    train(straight, tmp_path / "straight", ROWS, VALIDATION)
    messages: list[str] = []

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(
            make_model(llama, engine=engine, dropout=0.1), tmp_path / "run", ROWS, VALIDATION, sinks=[interrupt],
            message=messages.append,
        )
    assert caught.value.step == 5  # the row of step 4 was written inside step 4; the one after it was finished
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoints" / "checkpoint-5"
    assert signal.getsignal(number) == before
    assert "finishing this step" in messages[0]
    model = make_model(llama, engine=engine, dropout=0.1)
    train(model, tmp_path / "run", ROWS, VALIDATION, resume=True)
    assert_equal_tensors(trained_tensors(model), trained_tensors(straight))


def test_a_second_ctrl_c_ends_at_once(llama: Path, engine: str, tmp_path: Path) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_model(llama, engine=engine), tmp_path, ROWS, sinks=[interrupt], save_every_steps=2)
    assert newest_good(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"


def test_the_model_is_left_as_it_was_found(llama: Path, tmp_path: Path) -> None:
    model = make_model(llama)
    model.config.use_cache = True
    forward = model.forward.__func__
    train(model, tmp_path, ROWS, max_steps=2, precision="bf16")
    assert model.config.use_cache
    assert getattr(model.forward, "__func__", model.forward) is forward
    assert not model.training


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp16"}, "needs a GPU"), ({"optimizer": "sgd"}, "paged_adamw_8bit"),
        ({"schedule": "cosin"}, "cosine"), ({"precision": "half"}, "bf16"),
    ],
)
def test_settings_that_cannot_be(llama: Path, engine: str, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(make_model(llama, engine=engine), tmp_path, ROWS, **changes)


def test_no_rows(llama: Path, engine: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no rows"):
        train(make_model(llama, engine=engine), tmp_path, [])


def test_report_whose_package_is_missing(llama: Path, engine: str, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match="pip install trackio"):
        train(make_model(llama, engine=engine), tmp_path, ROWS, report_to=["trackio"])
