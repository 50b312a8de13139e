from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chulengo.errors import ModelError, NetworkError
from chulengo.model.folder import (
    context_tokens,
    is_encoder_decoder,
    length_note,
    resolve_model,
    usual_tokens,
    weight_files,
    weights_hash,
)

CONFIG = {"model_type": "llama", "max_position_embeddings": 128}


def make(folder: Path, *, config: object = CONFIG, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"t{i}": torch.arange(10.0) + i for i in range(shards)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = {f"t{i}": f"model-{i}.safetensors" for i in range(shards)}
    for tensor, name in names.items():
        save_file({tensor: tensors[tensor]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_whole_folder_is_returned(tmp_path: Path) -> None:
    assert resolve_model(str(make(tmp_path / "a"))) == tmp_path / "a"
    files = weight_files(make(tmp_path / "b", shards=2))
    assert [f.name for f in files] == ["model-0.safetensors", "model-1.safetensors"]
    assert resolve_model(str(tmp_path / "b")) == tmp_path / "b"


def broken(tmp_path: Path, how: str) -> Path:
    folder = make(tmp_path / "m", shards=2 if how in ("shard", "index") else 1)
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"model_type": ')
    elif how == "no model_type":
        (folder / "config.json").write_text("{}")
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif how == "shard":
        (folder / "model-1.safetensors").unlink()
    elif how == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif how == "cut in header":
        weights.write_bytes(weights.read_bytes()[:20])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "lfs":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    elif how == "garbage":
        weights.write_bytes((8).to_bytes(8, "little") + b"notjson!")
    elif how == "adapter":
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no config", "no config.json"), ("broken config", "not valid JSON"), ("no model_type", "model_type"),
        ("no weights", "no weights"), ("pickle", "convert them"), ("shard", "lacks 1 of 2 weight files: model-1"),
        ("index", "weight_map"), ("cut", "not complete: its header describes"), ("cut in header", "cut off at 20"),
        ("empty", "cut off at 0"), ("lfs", "Git LFS pointer"), ("garbage", "broken safetensors header"),
        ("adapter", "--model org/base --adapter"),
    ],
)
def test_each_defect_is_named(tmp_path: Path, how: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(broken(tmp_path, how)))
    assert says in str(caught.value)
    assert "m" in caught.value.given


def test_missing_folder_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "llama-tiny")
    with pytest.raises(ModelError, match=r"--model .*llama-tiny"):
        resolve_model(str(tmp_path / "lama-tiny"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="--model nano"):
        resolve_model("nanoo")
    (tmp_path / "models").mkdir()
    make(tmp_path / "models" / "llama")
    with pytest.raises(ModelError, match="--model models/llama"):
        resolve_model("models/lama")


def test_a_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m")
    with pytest.raises(ModelError, match=f"--model {tmp_path / 'm'}"):
        resolve_model(str(tmp_path / "m" / "model.safetensors"))


def test_hub_name_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(NetworkError, match="offline"):
        resolve_model("some-org/no-such-model", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="offline"):
        resolve_model("some-org/no-such-model")


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code = (
        "from chulengo.model.folder import resolve_model\n"
        "from chulengo.errors import NetworkError\n"
        "try: resolve_model('some-org/some-model')\n"
        "except NetworkError as e: print(e)"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "cannot be reached for some-org/some-model" in out.stdout
    assert "--model nano" in out.stdout


def test_gated_hub_model_says_how_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def refuse(error: type[Exception]) -> None:
        def download(*args: object, **kwargs: object) -> None:
            raise error.__new__(error)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    refuse(GatedRepoError)
    with pytest.raises(NetworkError, match="hf auth login"):
        resolve_model("meta-llama/Llama-2-7b-chat-hf")
    refuse(RepositoryNotFoundError)
    with pytest.raises(ModelError, match="no Hub model"):
        resolve_model("meta-llama/Llama-2-7b-chat-hg")


@pytest.mark.parametrize(("stated", "usual"), [({}, 512), ({"n_positions": 64}, 64)])
def test_relative_positions_have_no_limit(stated: dict[str, int], usual: int) -> None:
    config = {"model_type": "t5", **stated}
    assert context_tokens(config) is None
    assert usual_tokens(config) == usual
    assert f"{usual} tokens" in str(length_note(None, config))
    assert length_note(100, config) is None
    assert length_note(None, CONFIG) is None


def test_facts_of_a_config() -> None:
    assert context_tokens(CONFIG) == 128
    assert context_tokens({"text_config": {"max_position_embeddings": 64}}) == 64
    assert context_tokens({"n_positions": 1024}) == 1024
    assert context_tokens({}) is None
    assert usual_tokens({}) is None
    assert is_encoder_decoder({"model_type": "t5"})
    assert is_encoder_decoder({"model_type": "x", "is_encoder_decoder": True})
    assert not is_encoder_decoder(CONFIG)


def test_hash_sees_weights_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m")
    first = weights_hash(folder)
    assert first == weights_hash(folder)
    assert first.startswith("sha256:")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights_hash(folder) != first
    monkeypatch.setattr("chulengo.model.folder.FULL_HASH_BYTES", 10)
    monkeypatch.setattr("chulengo.model.folder.SAMPLE_BYTES", 1)
    monkeypatch.setattr("chulengo.model.folder.SAMPLES", 2)
    sampled = weights_hash(folder)
    assert sampled.startswith("sampled-sha256:")
    data[-1] ^= 1  # the last byte is in the sample
    (folder / "model.safetensors").write_bytes(data)
    assert weights_hash(folder) != sampled


def test_resolving_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom chulengo.model.folder import resolve_model, weights_hash\n"
        f"weights_hash(resolve_model({str(make(tmp_path / 'm'))!r}))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
