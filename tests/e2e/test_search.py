"""`chulengo search` as a user types it: a study and a curve, killed and gone on with, and what it leads to."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from chulengo.train.metrics import MetricsFile
from command_kit import Capture, done, next_command, refused, started, wait_for

pytest.importorskip("optuna")

NANO = ["search", "--model", "nano", "--data", "nano-demo", "--set", "data.num_rows=32", "--set",
        "data.validation_fraction=0.25", "--points", "2"]  # fmt: skip
SPACE = ["--space", "learning_rate=1e-3..1e-2:log", "--space", "rank=2,4", "--space", "epochs=0.5,1"]
TINY_SPACE = ["--space", "learning_rate=1e-4..1e-1:log", "--space", "dropout=0,0.1"]


def study(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


def finished(out: Path) -> list[tuple[Any, ...]]:
    return [(t["params"], t["value"], t["state"], t["steps"]) for t in study(out)["trials"]
            if t["state"] != "interrupted"]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_words(tiny_model: Path, tiny_data: Path) -> list[str]:
    """A search of short trials on the tiny model, up to its number of trials and its folder."""
    return ["search", "--model", str(tiny_model), "--data", str(tiny_data), "--points", "2",
            "--set", "training.max_steps=12", *TINY_SPACE]  # fmt: skip


@pytest.mark.slow
def test_search_and_train_the_best(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "my search"
    said, progress = done(capsys, *NANO, *SPACE, "--trials", 3, "--out", out)
    found = study(out)
    trials = found["trials"]
    assert [(t["number"], t["state"]) for t in trials] == [(0, "complete"), (1, "complete"), (2, "complete")]
    assert found["space"]["lora.rank"] == {"choices": [2, 4]}
    assert found["best"]["value"] == min(t["value"] for t in trials)
    for trial in trials:
        assert [step for step, _ in trial["steps"]] == sorted({step for step, _ in trial["steps"]})
        assert trial["steps"][0][0] == 0
        assert trial["value"] == min(loss for _, loss in trial["steps"][1:])
        assert trial["steps"][0] == trials[0]["steps"][0], "the same base on the same validation rows"
        folder = out / "trials" / f"{trial['number']:04d}"
        assert {file.name for file in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "result.json"}
        assert not (folder / "adapter").exists()
        assert not (folder / "checkpoints").exists()
    assert progress.count("\ntrial ") == 3
    assert "8 validation rows" in progress
    assert (out / "plots" / "search.png").read_bytes()[:4] == b"\x89PNG"
    # the printed command trains the best trial again, to the bit
    command = next(line for line in said.splitlines() if line.startswith("Next: chulengo "))
    words = next_command(command.replace("Next:", "  try:"))
    assert words == ["train", "--config", str(out / "best.yaml")]
    done(capsys, *words, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tuned_loss"] == found["best"]["value"]
    spelled = next(line for line in said.splitlines() if line.startswith("  chulengo train --set"))
    again = next_command("  try:" + spelled)
    done(capsys, *again, "--dry-run")
    # the same command again: nothing to do; another space: refused
    before = (out / "study.db").read_bytes()
    done(capsys, *NANO, *SPACE, "--trials", 3, "--out", out)
    assert len(study(out)["trials"]) == 3
    message = refused(capsys, *NANO, "--space", "rank=2,8", "--trials", 3, "--out", out)
    assert "belongs to another search" in message
    assert "lora.rank was 2,4, now 2,8" in message
    message = refused(capsys, *NANO, *SPACE, "--set", "data.seed=1", "--trials", 3, "--out", out)
    assert "the training rows changed" in message
    assert (out / "study.db").read_bytes() == before


def test_what_trial_0_is_and_what_the_best_is_the_best_of(
    tiny_words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = tiny_words[: -len(TINY_SPACE)]
    space = ("--set", "training.learning_rate=1e-3", "--set", "lora.rank=8", "--space", "learning_rate=1e-3,1e30")
    _, said = done(capsys, *words, *space, "--trials", 3, "--out", tmp_path / "in")
    assert "(the configuration as it is)" in said
    states = [trial["state"] for trial in study(tmp_path / "in")["trials"]]
    complete = states.count("complete")
    assert 0 < complete < len(states)
    best = (tmp_path / "in" / "best.yaml").read_text()
    assert best.startswith(f"# The best of {complete} complete trials (of {len(states)}): number ")
    _, said = done(capsys, *words, *space[:4], "--space", "learning_rate=1e-3,1e-2", "--space", "rank=2,4",
                   "--trials", 1, "--out", tmp_path / "out")
    assert "(not the configuration, which is outside the space: rank 8)" in said
    assert "the configuration as it is" not in said
    assert (tmp_path / "out" / "best.yaml").read_text().startswith("# The best of 1 complete trial: number 0")


@pytest.mark.slow
def test_kill_9_and_ctrl_c(tiny_words: list[str], tmp_path: Path, capsys: Capture) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    done(capsys, *tiny_words, "--trials", 3, "--out", straight)
    with started(*tiny_words, "--trials", 3, "--out", out) as process:
        wait_for(process, out / "trials" / "0000" / "metrics.jsonl", lines=4)
        process.kill()
        process.wait(30)
    with started("search", "--resume", out) as process:
        wait_for(process, out / "trials" / "0002" / "metrics.jsonl", lines=4)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "chulengo: Stopped in trial 2, which begins again. Finished trials kept: 1." in said
    command = next_command(said)
    assert command == ["search", "--resume", str(out)]
    assert [t["state"] for t in study(out)["trials"]] == ["interrupted", "complete", "interrupted"]
    done(capsys, *command)
    assert finished(out) == finished(straight), "as if nothing had happened"
    assert sorted(folder.name for folder in (out / "trials").iterdir()) == ["0001", "0003", "0004"]
    assert not (out / "run.lock").exists()


@pytest.mark.slow
def test_data_sizes_in_the_space(tiny_words: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    done(capsys, *tiny_words[:-4], "--space", "rows=4,9", "--space", "rank=2,4", "--trials", 3, "--keep-adapters",
         "--out", out)  # fmt: skip
    trials = study(out)["trials"]
    assert len({t["steps"][0][1] for t in trials}) == 1, "the validation rows do not depend on the size"
    for trial in trials:
        ledger = json.loads((out / "trials" / f"{trial['number']:04d}" / "ledger.json").read_text())
        assert ledger["train"]["num_rows"] == trial["params"]["data.num_rows"]
        assert (out / "trials" / f"{trial['number']:04d}" / "adapter" / "adapter_model.safetensors").is_file()
    done(capsys, "train", "--config", out / "best.yaml", "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tuned_loss"] == study(out)["best"]["value"]


@pytest.mark.slow
def test_sample_sizes(tiny_words: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = ["search", *tiny_words[1:-6], "--set", "training.learning_rate=1e-2", "--out", str(out),
             "--sample-sizes", "4,8,all", "--exact-match", "--max-new-tokens", "4"]  # fmt: skip
    said, _ = done(capsys, *words, "--repeats", 1)
    assert "One repeat has no interval" in said
    said, progress = done(capsys, "search", "--resume", out, "--repeats", 2)
    assert progress.count("(done before)") == 3
    found = json.loads((out / "curve.json").read_text())
    rows = [point["rows"] for point in found["points"]]
    assert rows == [4, 8, 22]
    assert [len(point["values"]) for point in found["points"]] == [2, 2, 2]
    assert [each["metric"] for each in found["curves"]] == ["validation loss", "exact match"]
    assert f"Do I need more data?\n  by validation loss: {found['verdict']['text']}" in said
    seen: dict[tuple[int, int], set[str]] = {}
    for size in rows:
        for repeat in range(2):
            folder = out / "sizes" / f"{size}-{repeat}"
            validation = [row for row in MetricsFile(folder / "metrics.jsonl").rows() if row["kind"] == "validation"]
            point = next(point for point in found["points"] if point["rows"] == size)
            assert point["values"][repeat] == min(row["loss"] for row in validation[1:])
            ledger = json.loads((folder / "ledger.json").read_text())
            assert ledger["train"]["num_rows"] == size
            assert not (folder / "adapter").exists()
            config = (folder / "config.yaml").read_text()
            assert f"num_rows: {size}\n" in config
            seen[size, repeat] = {str(validation[0]["loss"])}
    assert len(set.union(*seen.values())) == 1, "the same base on the same validation rows"
    assert (out / "plots" / "curve.svg").is_file()
    assert "--space and --sample-sizes" in refused(capsys, *words, "--space", "rank=2,4")
    assert "exact_match" not in refused(capsys, *words, "--points", "3")


def test_refusals(tiny_words: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = [*tiny_words, "--out", str(out)]
    cases: list[tuple[list[str], str]] = [
        (["--trials", "0"], "--trials is 0"),
        (["--space", "learning_rate=1..2:log", "--space", "lora.rank=0..4"], "lora.rank must be at least 1"),
        (["--space", "dropout=0..2"], "lora.dropout must be at least 0 and below 1"),
        (["--space", "schedule=linear,cosin"], "training.schedule is one of"),
        (["--space", "model.name=a,b"], "no setting that can be searched"),
        (["--space", "epochs=1,2"], "training.max_steps says the same and wins"),
        (["--space", "rows=5..500"], "there are 22 rows"),
        (["--set", "data.validation_fraction=0"], "needs validation rows"),
        (["--sample-sizes", "5,50"], "--space and --sample-sizes are two searches"),
        (["--resume", str(tmp_path)], "cannot be given with it"),
    ]
    for more, said in cases:
        assert said in refused(capsys, *words, *more, unmade=out), more
    plain = words[:5] + words[words.index("--out") :]
    for sizes, said in (("5,50", "Sizes of 50 asked for; there are 22 training rows"), ("5,5", "names a size twice")):
        assert said in refused(capsys, *plain, "--sample-sizes", sizes, unmade=out)
    assert "holds no search" in refused(capsys, "search", "--resume", tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert "files that no run wrote" in refused(capsys, *tiny_words, "--out", tmp_path / "used")
    out.mkdir()
    (out / "study.db").write_text("no study at all")
    assert "is no study" in refused(capsys, *words)


@pytest.mark.slow
def test_equal_steps(tiny_words: list[str], tmp_path: Path, capsys: Capture) -> None:
    words = [*tiny_words[:-6], "--sample-sizes", "4,20", "--repeats", "1", "--out", str(tmp_path / "out")]
    done(capsys, *words, "--equal", "steps")
    steps = {
        size: json.loads((tmp_path / "out" / "sizes" / f"{size}-0" / "result.json").read_text())["steps"]
        for size in (4, 20)
    }
    assert steps == {4: 5, 20: 5}, "one epoch of 20 rows in batches of 4"
    message = refused(capsys, *words)
    assert "what is equal for all sizes was 'steps', now 'epochs'" in message
