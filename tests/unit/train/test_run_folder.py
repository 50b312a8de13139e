from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chulengo.errors import TrainingError
from chulengo.train.run_folder import create_default_run, create_run, default_root, open_run, write_json, write_text

HOLDER = """
import sys, time
from pathlib import Path
from chulengo.train.run_folder import create_run, write_text
with create_run(Path(sys.argv[1])) as paths:
    write_text(paths.config, "out: x\\n")
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(root: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _race(root: Path, start: float, results: multiprocessing.Queue[str]) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        with create_run(root) as paths:
            time.sleep(0.5)
            write_text(paths.config, f"winner: {os.getpid()}\n")
        results.put("won")
    except TrainingError as error:
        results.put(str(error))


def test_a_new_run_has_its_folders_and_leaves_no_lock_behind(tmp_path: Path) -> None:
    with create_run(tmp_path / "a" / "b") as paths:
        assert paths.lock.is_file()
        assert paths.plots.is_dir()
        assert paths.checkpoints.is_dir()
    assert not paths.lock.exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    with create_run(tmp_path / "r") as paths:
        write_text(paths.config, "out: r\n")
        write_json(paths.manifest, {"started_utc": "2026-11-20T10:00:00+00:00"})
        write_text(paths.metrics, '{"kind": "train", "step": 1}\n{"kind": "train", "step": 12}\n')
        (paths.checkpoints / "checkpoint-10").mkdir()
    before = sorted(p.name for p in paths.root.rglob("*"))
    with pytest.raises(TrainingError) as caught, create_run(tmp_path / "r"):
        pass
    text = str(caught.value)
    assert "holds another run: started 2026-11-20" in text
    assert "12 steps done, last checkpoint at step 10" in text
    assert f"chulengo train --resume {tmp_path / 'r'}" in text
    assert "choose another --out" in text
    assert sorted(p.name for p in paths.root.rglob("*")) == before


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(TrainingError, match=r"files that no run wrote: thesis\.doc"), create_run(tmp_path):
        pass
    assert (tmp_path / "thesis.doc").read_text() == "years of work"
    assert not (tmp_path / "run.lock").exists()


def test_an_empty_folder_and_a_gitignore_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*\n")
    with create_run(tmp_path):
        pass


def test_a_file_as_output_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(TrainingError, match="is a file"), create_run(tmp_path / "f"):
        pass
    with pytest.raises(TrainingError, match=r"Cannot write|is a file"), create_run(tmp_path / "f" / "below"):
        pass


def test_of_two_processes_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    start = time.time() + 0.3
    racers = [context.Process(target=_race, args=(tmp_path / "r", start, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    said = [results.get(timeout=20) for _ in racers]
    for racer in racers:
        racer.join()
    assert said.count("won") == 1
    assert all("being written right now" in text or "holds another run" in text for text in said if text != "won")


def test_a_killed_process_does_not_block_a_resume(tmp_path: Path) -> None:
    process = _holder(tmp_path / "r")
    try:
        with pytest.raises(TrainingError, match=f"process {process.pid} on"), open_run(tmp_path / "r"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "r" / "run.lock").exists()
    with open_run(tmp_path / "r") as paths:
        assert paths.config.read_text() == "out: x\n"


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"), open_run(tmp_path / "nothing"):
        pass
    with pytest.raises(TrainingError, match="holds no run"), open_run(tmp_path):
        pass


def test_default_names_are_free_and_readable(tmp_path: Path) -> None:
    assert default_root(tmp_path, "meta-llama/Llama-2-7b-chat-hf", "data/Guanaco 1k.jsonl.gz").name == (
        "llama-2-7b-chat-hf-guanaco-1k-1"
    )
    runs = tmp_path / "runs"
    with create_default_run(runs, "nano", "demo") as first, create_default_run(runs, "nano", "demo") as second:
        pass
    assert (first.root.name, second.root.name) == ("nano-demo-1", "nano-demo-2")


def test_a_write_that_fails_leaves_the_old_content_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_is_valid_whatever_the_numbers_and_readable_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": "ä"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": None, "b": [None, 1.5], "c": "ä"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~umask
