"""`kill -9` at random moments, then resume: the adapter is bit-equal to that of the uninterrupted run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chulengo.train.checkpoint import steps
from training_kit import assert_equal_tensors, make_llama

RUN = """
import sys
from pathlib import Path
from training_kit import make_model, make_rows, train
from chulengo.train.engine import adapter_writer
from chulengo.train.checkpoint import steps
llama, out, batching, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
model = make_model(llama, engine=engine, dropout=0.2)
say = lambda row: print(row["step"], flush=True)
train(
    model, out, make_rows(53), make_rows(5, seed=1), batching=batching, epochs=3.0, save_every_steps=3, sinks=[say],
    resume=bool(steps(out / "checkpoints")),
)
adapter_writer(model)(out / "adapter")
"""


def start(llama: Path, out: Path, batching: str, engine: str) -> subprocess.Popen[str]:
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-c", RUN, str(llama), str(out), batching, engine]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("batching", ["group_by_length", "packed"])
def test_killed_run_ends_where_the_straight_one_does(tmp_path: Path, batching: str, engine: str) -> None:
    llama = make_llama(tmp_path / "llama")
    straight = start(llama, tmp_path / "straight", batching, engine)
    assert straight.wait(180) == 0
    moments = random.Random(batching + engine)
    for rows in (5, 4):
        process = start(llama, tmp_path / "run", batching, engine)
        assert process.stdout is not None
        for _ in range(rows):
            assert process.stdout.readline(), "the run ended before it could be killed"
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert process.wait(60) == -9
    before = steps(tmp_path / "run" / "checkpoints")
    assert before
    final = start(llama, tmp_path / "run", batching, engine)
    assert final.stdout is not None
    said = final.stdout.read().split()
    assert final.wait(180) == 0
    assert int(said[0]) == before[-1] + 1, "it went on from the newest checkpoint"
    assert_equal_tensors(
        load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "straight" / "adapter" / "adapter_model.safetensors"),
    )
