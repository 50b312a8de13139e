"""Kernels are compiled before the first step: all of them, and nothing else changes.

Without a GPU: what is compiled ahead is what a launch looks for (compiled for Hopper, launched by a driver that only
counts), and a step launches nothing that the rehearsal did not, by the keys that Triton would make.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chulengo.data.batches import IGNORE, collate_packed
from chulengo.model.fast import FastModel
from chulengo.model.packed_inputs import PackedInputs, pack_batch
from chulengo.model.rehearsal import few_tokens, rehearse
from fast_models import gradients, make_family, make_fast, randomise
from training_kit import assert_equal_tensors, make_rows

HAS_CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
FAMILY, MIXED = "llama with shared key heads", ["keep", "selective", "full", "offload"]
MODELS: dict[str, dict[str, Any]] = {
    "folded": {"activations": "selective"},
    "kept": {"weights": "resident", "activations": "keep"},
    "mixed": {"activations": MIXED},
    "separate": {"activations": MIXED, "lora": {"form": "separate"}},
    "dropout": {"activations": MIXED, "lora": {"dropout": 0.2}},
    "dropout of queries": {"activations": "selective", "lora": {"dropout": 0.2, "targets": ("q_proj",)}},
    "dora": {"activations": MIXED, "lora": {"dora": True}},
    "some maps": {"activations": MIXED, "lora": {"targets": ("q_proj", "down_proj")}},
    "fp8": {"weights": "stream-fp8", "activations": "selective"},
    "fp8, kept": {"weights": "resident-fp8", "activations": "keep"},
    "fp8, mixed": {"weights": "stream-fp8", "activations": MIXED, "lora": {"rank": 16}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(
        FAMILY, tmp_path_factory.mktemp("llama"), hidden_size=256, num_attention_heads=4, intermediate_size=320
    )


def model_of(folder: Path, name: str, *, device: str) -> FastModel:
    model = make_fast(folder, device=device, compute_dtype="bfloat16", backend="fused", **MODELS[name])
    model.train()
    return model


def batches() -> list[PackedInputs]:
    """Of other numbers of tokens than the rehearsal's, one of them a multiple of 16 in equally long sequences."""
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = IGNORE
    dense = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    uneven = [collate_packed([make_rows(number, longest=longest)], pad_id=0) for number, longest in ((1, 9), (5, 20))]
    return [pack_batch(batch) for batch in (*uneven, dense)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's assembler is an x86-64 program here")
def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_side_by_side.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["threads"] > 1
    del report["threads"]
    assert report == {
        "compiled": 5, "launched at first": 0, "launched then": 10, "compiled then": 0, "compiled again": 0,
        "by itself": 5, "from files": 5, "restored": True,
    }  # fmt: skip


@pytest.mark.skipif(HAS_CUDA, reason="of the interpreter")
def test_nothing_is_done_in_the_interpreter() -> None:
    from chulengo.kernels.fused.compile_ahead import compiled_ahead

    assert compiled_ahead(lambda: pytest.fail("the work ran"), 2) == 0


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """What would be compiled, by the rules of Triton; no kernel runs, and what none has written is NaN."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import native_specialize_impl

    from chulengo.kernels.fused import attention as flash
    from chulengo.kernels.reference import attention as plain

    found: set[Any] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        plain_ones = self.kwargs["do_not_specialize"] or ()
        parts = [
            native_specialize_impl(backend, value, False, name not in plain_ones, True)
            for name, value in zip(self.arg_names, arguments, strict=False)
        ]
        found.add((self.fn.__module__, self.__name__, tuple(parts), tuple(sorted(constants.items()))))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(flash, "packed_attention", plain.packed_attention)
    monkeypatch.setattr("chulengo.model.fast.check_norm", lambda name, norm_O: None)  # of a row that nobody has written
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is empty with NaN
    yield found
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(HAS_CUDA, reason="of the interpreter")
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_launches_what_the_rehearsal_did(folder: Path, name: str, keys: set[Any]) -> None:
    model = model_of(folder, name, device="cpu")
    keys.clear()
    inputs = few_tokens(model.shape.max_seq_tokens)
    rehearse(model.weights, model._run(inputs, model._next_seed(), None), model._activations)
    rehearsed = set(keys)
    keys.clear()
    for _ in range(2):  # the adapter's copies are refreshed between
        for batch in batches():
            model.nll(batch)[0].backward()
    assert len(keys) > 5
    assert keys - rehearsed == set()


def forget_kernels() -> None:
    """Lets this process look for its kernels in Triton's files again."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("chulengo.kernels.fused."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled or read from Triton's files."""
    import triton

    found: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *, repr, **_: found.append(repr), raising=False
    )
    forget_kernels()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_steps_compile_nothing(folder: Path, name: str, graphs: bool, compiled: list[str]) -> None:
    model = make_fast(folder, device="cuda", compute_dtype="bfloat16", graphs=graphs, **MODELS[name])
    model.train()
    assert len(compiled) > 5
    compiled.clear()
    for _ in range(2):
        for batch in batches():
            model.nll(batch)[0].backward()
    assert compiled == []
    assert model.prepare() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_stay(
    folder: Path, name: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batches()[0]

    def outcome() -> dict[str, torch.Tensor]:
        forget_kernels()
        model = model_of(folder, name, device="cuda")
        randomise(model.named_parameters())
        nll, found = gradients(model, batch)
        return found | {"loss": nll}

    prepared = outcome()
    monkeypatch.setattr(FastModel, "prepare", lambda self: 0)
    assert_equal_tensors(outcome(), prepared)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_behind(folder: Path, name: str, compiled: list[str]) -> None:
    model = model_of(folder, name, device="cuda")
    for again in (False, True):  # launches left out, and not
        if not again:
            forget_kernels()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.get_rng_state(), torch.random.get_rng_state()
        assert (model.prepare() == 0) is again
        assert torch.cuda.memory_allocated() == before[0]
        assert torch.equal(torch.cuda.get_rng_state(), before[1])
        assert torch.equal(torch.random.get_rng_state(), before[2])
    assert model.micro_step == 0
    assert all(value.grad is None for value in model.named_parameters().values())
