"""What is insisted on and cannot be had is refused, by plan and train, with what to type instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chulengo.cli.main import main
from chulengo.errors import ConfigError
from chulengo.model import fast
from chulengo.model.plan import DeviceMemory
from chulengo.model.plan_policies import Wanted
from chulengo.model.plan_shapes import read_shape
from chulengo.model.policy_checks import check_policies

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
GPU, CPU = DeviceMemory("Some GPU", "cuda", GIB, GIB, capability=(9, 0)), DeviceMemory("the CPU", "cpu", GIB, GIB)
OLD, UNKNOWN = (DeviceMemory("Old GPU", "cuda", GIB, GIB, capability=c) for c in ((8, 6), None))
TIED, ODD = {"tie_word_embeddings": True}, {"intermediate_size": 500}
FEW_KEYS = {"num_key_value_heads": 1, "head_dim": 8}


def asked(wanted: Wanted, device: DeviceMemory, **changes: Any) -> None:
    shape = read_shape(CONFIG | changes)
    assert shape is not None
    check_policies(wanted, shape, device)


@pytest.mark.parametrize(("wanted", "device", "changes", "said", "key"), [
    (Wanted("fp8"), OLD, {}, "Old GPU has no products in FP8 (compute capability 8.6)", "model.weights_policy"),
    (Wanted("fp8"), GPU, ODD, "intermediate_size of 500 features", "model.weights_policy"),
    (Wanted("stream-fp8"), UNKNOWN, FEW_KEYS, "key heads of 8 features", "model.weights_policy"),
    (Wanted(embeddings="host"), GPU, TIED, "the model's head is the same table", "model.embeddings_policy"),
    (Wanted(graphs="always"), CPU, {}, "no CUDA graphs on the CPU", "model.graphs"),
])  # fmt: skip
def test_refused_with_what_to_type(
    wanted: Wanted, device: DeviceMemory, changes: dict[str, Any], said: str, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(wanted, device, **changes)
    assert said in caught.value.given
    assert caught.value.given.startswith(f"{key} is ")
    assert caught.value.next_step == f"--set {key}=auto"


@pytest.mark.parametrize(("wanted", "device", "changes"), [
    (Wanted(), OLD, TIED | ODD), (Wanted("fp8"), GPU, {}), (Wanted("fp8"), UNKNOWN, {}), (Wanted("fp8"), CPU, ODD),
    (Wanted(embeddings="host"), CPU, {}), (Wanted(graphs="always"), OLD, {}), (Wanted("stream"), OLD, ODD),
])  # fmt: skip
def test_what_can_be_had_is_let_through(wanted: Wanted, device: DeviceMemory, changes: dict[str, Any]) -> None:
    asked(wanted, device, **changes)


@pytest.mark.parametrize(("given", "changes", "said"), [
    ({"weights": "stream-fp8"}, {}, "no products in FP8"), ({"embeddings": "host"}, TIED, "is the same table"),
    ({"graphs": True}, {}, "no CUDA graphs"),
])  # fmt: skip
def test_the_engine_itself_refuses_by_the_same_rule(
    given: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "device_memory", lambda device: OLD if "weights" in given else CPU)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ConfigError, match=said):  # before a weight is looked for
        fast.load_fast(tmp_path, device="cpu", **given)


@pytest.mark.parametrize(("settings", "changes", "key"), [
    (["model.weights_policy=fp8"], ODD, "model.weights_policy"),
    (["model.embeddings_policy=host"], TIED, "model.embeddings_policy"),
    (["model.graphs=always", "model.device=cpu"], {}, "model.graphs"),
])  # fmt: skip
def test_plan_does_not_say_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], changes: dict[str, Any], key: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    words = ["plan", "--model", str(tmp_path), "--device-memory", "24GiB", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"try:     --set {key}=auto" in captured.err
    # what it says to type, typed
    assert main([*words, "--set", f"{key}=auto"]) == 0
