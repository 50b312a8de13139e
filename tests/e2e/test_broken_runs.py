"""Runs that are broken off (Ctrl-C, kill, a full disk, NaN) and gone on with, through the command line.

Each broken run is compared with the same run left in peace: the adapters must be equal to the bit.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chulengo.train.checkpoint import steps
from chulengo.train.metrics import MetricsFile
from command_kit import (
    Capture,
    adapter_tensors,
    conversation,
    done,
    next_command,
    refused,
    started,
    wait_for,
    write_lines,
)
from training_kit import assert_equal_tensors

NUM_STEPS = 60
RHYTHM = ["--set", f"training.max_steps={NUM_STEPS}", "--set", "training.save_every_steps=5",
          "--set", "training.eval_every_steps=20", "--set", "lora.dropout=0.1"]  # fmt: skip
SHORT = ["--set", "training.max_steps=4", "--set", "training.save_every_steps=1",
         "--set", "training.keep_checkpoints=4"]  # fmt: skip

OURS = re.compile(r"(.+: 60 steps|step \d+/60 |validation at step \d+: |SIGINT: |chulengo: |  try:     )")


@pytest.fixture(scope="session")
def words(tiny_model: Path, tiny_data: Path) -> list[str]:
    """The command up to the output folder."""
    return ["train", "--model", str(tiny_model), "--data", str(tiny_data), "--out"]


@pytest.fixture(scope="session")
def straight(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of RHYTHM, left in peace."""
    from chulengo.cli.main import main

    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([*words, str(out), *RHYTHM]) == 0
    return out


@pytest.fixture
def short(words: list[str], tmp_path: Path, capsys: Capture) -> Path:
    """A finished run of four steps with a checkpoint each."""
    done(capsys, *words, tmp_path / "short", *SHORT)
    return tmp_path / "short"


def assert_whole_and_equal(run: Path, straight: Path) -> None:
    assert_equal_tensors(adapter_tensors(run), adapter_tensors(straight))
    rows, others = (MetricsFile(folder / "metrics.jsonl").rows() for folder in (run, straight))
    assert [(r["kind"], r["step"], r["loss"]) for r in rows] == [(r["kind"], r["step"], r["loss"]) for r in others]
    assert not list(run.rglob(".staging*"))
    assert not (run / "run.lock").exists()


def test_ctrl_c_and_two_writers(words: list[str], straight: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "my run"  # the command it prints must be quoted
    with started(*words, out, *RHYTHM) as process:
        wait_for(process, out / "metrics.jsonl", lines=8)
        process.send_signal(signal.SIGSTOP)
        said = refused(capsys, "train", "--resume", out)
        assert f"is being written right now by process {process.pid}" in said
        assert "holds another run" in refused(capsys, *words, out)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    noise = [line for line in said.splitlines() if not OURS.match(line)]
    assert not noise, "the libraries' own lines are kept from the user"
    assert "SIGINT: finishing this step and saving; once more stops at once." in said
    stopped = re.search(r"chulengo: Stopped after step (\d+); the state is saved in (.+)\.\n", said)
    assert stopped is not None, said
    step = int(stopped[1])
    assert 7 <= step < NUM_STEPS
    assert steps(out / "checkpoints")[-1] == step
    assert Path(stopped[2]) == out / "checkpoints" / f"checkpoint-{step}"
    assert not (out / "adapter").exists()
    command = next_command(said)
    assert command == ["train", "--resume", str(out)]
    _, said = done(capsys, *command)
    assert f"resumed at {step}" in said
    assert_whole_and_equal(out, straight)


def test_kill_9(words: list[str], straight: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    with started(*words, out, *RHYTHM) as process:
        wait_for(process, out / "metrics.jsonl", lines=13)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    saved = steps(out / "checkpoints")[-1]
    assert 10 <= saved < NUM_STEPS
    _, said = done(capsys, "train", "--resume", out)
    assert f"resumed at {saved}" in said
    assert_whole_and_equal(out, straight)


def test_a_limit_on_files_in_mid_run(words: list[str], straight: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    with started(*words, out, *RHYTHM) as process:
        wait_for(process, out / "checkpoints" / "checkpoint-5")
        # from now on no file may pass 50,000 bytes: the system refuses as a full disk does, to this process alone
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    refusal = re.search(r"The disk is full .*: checkpoint-(\d+) could not be written\. (.+) is untouched", said)
    assert refusal is not None, said
    assert steps(out / "checkpoints")[-1] == int(refusal[1]) - 5
    assert refusal[2].endswith(f"checkpoint-{int(refusal[1]) - 5}")
    assert "free some space, then chulengo train --resume" in said
    done(capsys, *next_command(said))
    assert_whole_and_equal(out, straight)


def test_ctrl_c_before_the_first_step_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(*words, out, *RHYTHM) as process:
        wait_for(process, out / "config.yaml")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    # CPython ends by the signal itself when it struck inside exec() of a text, as dataclasses do at import
    assert process.returncode in (2, -signal.SIGINT), said
    if out.exists():  # the first step had begun after all
        assert f"chulengo train --resume {out}" in said
        assert steps(out / "checkpoints")
    else:
        assert "chulengo: interrupted" in said


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; its size is set by `resize`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system; the limit on files is tested instead")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def on_disk(folder: Path, pattern: str) -> int:
    """Returns the KiB that the files take on a tmpfs, which counts in pages."""
    return sum(-(-file.stat().st_size // 4096) * 4 for file in folder.glob(pattern))



def test_a_full_disk(words: list[str], disk: Path, capsys: Capture, short: Path) -> None:
    out = disk / "run"
    checkpoints, adapter = on_disk(short, "checkpoints/*/*"), on_disk(short, "adapter/*")
    # room for the first of four checkpoints, not for the second
    resize(disk, f"{checkpoints * 3 // 8 + 40}k")
    said = refused(capsys, *words, out, *SHORT)
    assert "checkpoint-2 could not be written" in said
    assert f"{out}/checkpoints/checkpoint-1 is untouched" in said
    assert next_command(said) == ["train", "--resume", str(out)]
    # KiB; and the run's own files, some of which grow
    used = checkpoints + on_disk(out, "*.*") + on_disk(out, "plots/*") + 16
    # room for the four checkpoints, not for the adapter
    resize(disk, f"{used}k")
    said = refused(capsys, *next_command(said))
    assert f"No space left on the disk of {out}/adapter: it was not written" in said
    assert steps(out / "checkpoints") == [1, 2, 3, 4]
    assert not (out / "adapter").exists()
    # room for the adapter too, not for the plot
    resize(disk, f"{used + adapter + 24}k")
    said = refused(capsys, *next_command(said))
    assert "No space left on the disk of" in said
    assert "loss." in said
    resize(disk, "9m")
    done(capsys, *next_command(said))
    assert_whole_and_equal(out, short)
    assert (out / "plots" / "loss.svg").exists()


def test_resume_of_what_is_no_run(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    said = refused(capsys, "train", "--resume", tmp_path / "none")
    assert "holds no run (no config.yaml)" in said
    assert "a folder that `chulengo train` wrote" in said
    refused(capsys, "train", "--resume", tmp_path)
    said = refused(capsys, "train", "--resume", tmp_path, "--set", "lora.rank=3", "--model", "nano")
    assert "--resume goes on with a run as it was configured, so --model, --set cannot be given with it" in said


def test_a_damaged_checkpoint_is_passed_over(short: Path, capsys: Capture) -> None:
    before = adapter_tensors(short)
    newest = short / "checkpoints" / "checkpoint-4"
    file = newest / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    (short / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    shutil.rmtree(short / "adapter")
    _, said = done(capsys, "train", "--resume", short)
    assert "checkpoint-4 is damaged (adapter_model.safetensors was changed); using the one before it." in said
    assert "checkpoint-3 is damaged (optimizer.pt is missing); using the one before it." in said
    assert "resumed at 2" in said
    assert_equal_tensors(adapter_tensors(short), before)
    for checkpoint in (short / "checkpoints").iterdir():
        (checkpoint / "complete.json").write_text("{")
    said = refused(capsys, "train", "--resume", short)
    assert "has no whole checkpoint to resume from" in said


def test_a_run_without_a_checkpoint_begins_again(short: Path, capsys: Capture) -> None:
    before = adapter_tensors(short)
    shutil.rmtree(short / "checkpoints")
    shutil.rmtree(short / "adapter")
    out, said = done(capsys, "train", "--resume", short)
    assert "ended before its first checkpoint; it begins again at step 0" in out + said
    assert_equal_tensors(adapter_tensors(short), before)
    rows = MetricsFile(short / "metrics.jsonl").rows()
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]


def test_resume_after_the_end_is_harmless(short: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file() and path.name != "result.json"}
    done(capsys, "train", "--resume", short)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("policy", "refused_with"), [
    ("stream", None), ("fp8", "  - model.weights_policy was 'resident', now 'fp8'\n"),
])  # fmt: skip
def test_another_weights_policy_is_another_run_only_in_fp8(
    short: Path, capsys: Capture, policy: str, refused_with: str | None
) -> None:
    config = short / "config.yaml"
    text = config.read_text()
    assert "weights_policy: resident" in text  # what the plan chose
    config.write_text(text.replace("weights_policy: resident", f"weights_policy: {policy}"))
    if refused_with is None:
        done(capsys, "train", "--resume", short)
    else:
        assert refused_with in refused(capsys, "train", "--resume", short)


def test_an_edited_config_is_refused_and_its_keys_named(short: Path, capsys: Capture) -> None:
    config = short / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("rank: 16", "rank: 8").replace("fraction: 0.1", "fraction: 0.2"))
    said = refused(capsys, "train", "--resume", short)
    assert "config.yaml was edited after the run was started" in said
    assert "  - data.validation_fraction was 0.1, now 0.2\n  - lora.rank was 16, now 8\n" in said
    assert f"chulengo train --config {config} --out NEW" in said
    config.write_text(text.replace("rank: 16", "rnk: 8"))
    assert "unknown key lora.rnk; did you mean lora.rank?" in refused(capsys, "train", "--resume", short)
    config.write_text(text.replace("keep_checkpoints: 4", "keep_checkpoints: 1"))  # changes no number
    done(capsys, "train", "--resume", short)


def test_changed_data_and_weights_are_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    import tiny_models

    model, data, out = tmp_path / "llama", tmp_path / "talks.jsonl", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    shutil.copy(tiny_data, data)
    done(capsys, "train", "--model", model, "--data", data, "--out", out, *SHORT)
    rows = data.read_text()
    data.write_text(rows.replace("What is 7?", "What is it?"))
    said = refused(capsys, "train", "--resume", out)
    assert "was started with other inputs; changed since: the training rows" in said
    data.write_text(rows)
    torch.manual_seed(7)
    other = tiny_models.tiny_llama(vocab_size=300, bos_token_id=1, eos_token_id=2)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    other.save_pretrained(model)
    assert "changed since: the model's weights" in refused(capsys, "train", "--resume", out)


def test_nan_names_step_rows_and_batch(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    said = refused(capsys, *words, out, *SHORT, "--set", "training.learning_rate=1e30", "--set",
                   "training.warmup_steps=0", "--set", "training.max_grad_norm=0")  # fmt: skip
    assert "The loss is nan at step 2; the run was stopped and the model not updated." in said
    batch = json.loads((out / "bad_batch-step2" / "batch.json").read_text())
    sources = re.findall(r"talks\.jsonl:\d+", said)
    assert len(sources) == 4
    assert all(source in json.dumps(batch) for source in sources)
    assert f"The batch is saved in {out}/bad_batch-step2" in said
    assert steps(out / "checkpoints") == [1], "what was saved before stays"
    assert [row["step"] for row in MetricsFile(out / "metrics.jsonl").rows() if row["kind"] == "train"] == [1]


def test_a_poisoned_model(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "llama"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = write_lines(tmp_path / "one.jsonl", conversation("Who?", "Me."))
    said = refused(capsys, "train", "--model", model, "--data", data, "--out", tmp_path / "run",
                   "--set", "data.validation_fraction=0")  # fmt: skip
    assert "The loss is nan at step 1" in said
    assert "Rows: " in said
    assert "one.jsonl:1" in said
