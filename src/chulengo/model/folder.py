"""From a model's name to a checked local folder, before anything heavy is imported.

A name is `nano` (the embedded model), a local folder, or a Hub name (`org/name`). Whichever it is, the result is a
folder with `config.json` and complete safetensors files: every shard that the index names is there, and every file is
as long as its own header says. That finds a broken download in milliseconds and with the file's name, where loading
would find it after minutes and with a stack of somebody else's frames.

Pickle weights are refused, always: reading them runs code from the file. Code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from chulengo.data.wording import counted
from chulengo.errors import ModelError, NetworkError, nearest

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.jinja",
)
HUB_NOT = ("*/*", "consolidated*")  # other copies of the same weights
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

# architectures that see distances between tokens, not positions -> tokens of a pretraining row, for configs without one
# (T5: Raffel et al. 2020, section 3.1.2, taken for its kin too; BLOOM: its model card)
RELATIVE_POSITIONS = {"t5": 512, "mt5": 512, "umt5": 512, "longt5": 512, "switch_transformers": 512, "bloom": 2048}

FULL_HASH_BYTES = 1 << 30  # larger weights are sampled: sha256 of 13.5 GB takes about 10 s from memory, more from disk
SAMPLE_BYTES, SAMPLES = 1 << 20, 64


def resolve_model(
    name: str, *, revision: str | None = None, offline: bool = False, weights: bool = True
) -> Path:
    """Returns the folder that holds a model's config and weights, complete; downloads it when it is a Hub name.

    Args:
        name: `nano`, a folder, or `org/name` on the Hub.
        revision: Hub branch, tag or commit.
        offline: only look in the local cache; `HF_HUB_OFFLINE=1` says the same.
        weights: False: a folder with a tokenizer will do, and nothing else is downloaded.

    Raises:
        ModelError: nothing is there, or what is there cannot be used; the message says which file and why.
        NetworkError: the Hub was needed and cannot be had.
    """
    if name == "nano":
        from chulengo import nano

        return check_folder(nano.model_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        is_adapter = (path / "adapter_config.json").is_file()
        return check_folder(path) if weights or is_adapter else path
    if path.exists():
        raise ModelError(
            f"--model {name} is a file.",
            allowed="nano, a folder with config.json and safetensors, or a Hub name (org/name)",
            next_step=f"--model {path.parent}",
        )
    if _is_hub_name(name):
        folder = _download(name, revision, offline or _offline_by_environment(), weights)
        return check_folder(folder, hub_name=name) if weights else folder
    raise _missing_folder(name, path)


def check_folder(folder: Path, *, hub_name: str | None = None) -> Path:
    """Returns the folder when it holds a readable config and complete safetensors weights.

    Raises:
        ModelError: it does not.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = _json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
            raise ModelError(
                f"{folder} holds a PEFT adapter, not a model.",
                next_step=f"--model {base} --adapter {folder}   (chat, generate, eval; training starts from a model)",
            )
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            raise ModelError(
                f"{folder} is the folder of a run, not a model.",
                next_step=f"chulengo chat --adapter {folder}, or chulengo train --resume {folder}",
            )
        raise ModelError(
            f"{hub_name or folder} has no config.json.",
            allowed="a folder in transformers' layout: config.json, model.safetensors, tokenizer files",
            next_step="name a folder with these files, or use --model nano",
        )
    read_config(folder)
    for file in weight_files(folder):
        _check_safetensors(file)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of the folder's `config.json`.

    Raises:
        ModelError: it is no JSON object, or does not say which architecture it is of.
    """
    config = _json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{folder / 'config.json'} names no model_type.",
            allowed='a config of transformers, such as {"model_type": "llama", ...}',
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files, those of the index when there is one.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map.", next_step="copy or download the file again")
        files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {counted(len(files), 'weight file')}: {', '.join(missing[:5])}"
                f"{' ...' if len(missing) > 5 else ''}.",
                next_step="copy or download the missing files",
            )
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)})
    if pickles:
        raise ModelError(
            f"{folder} has weights as pickle only ({', '.join(pickles[:3])}), which can run code when read.",
            allowed="safetensors",
            next_step="convert them, if you trust their author: python -c \"from transformers import "
            f"AutoModelForCausalLM as A; A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", "
            "then copy the tokenizer files too",
        )
    raise ModelError(
        f"{folder} has a config.json but no weights.",
        allowed="model.safetensors, or model.safetensors.index.json with its shards",
        next_step="copy or download the weights, or use --model nano",
    )


def context_tokens(config: dict[str, Any]) -> int | None:
    """Returns how many tokens the model has positions for; None when there is no such limit, or nothing says.

    T5 and BLOOM see distances, not positions: they read rows of any length. The `n_positions` that a T5 has is the
    length it was pretrained with, which is what `usual_tokens` is for.
    """
    return None if config.get("model_type") in RELATIVE_POSITIONS else _stated_tokens(config)


def usual_tokens(config: dict[str, Any]) -> int | None:
    """Returns the longest row when nobody asked for a length: the model's limit, else what it was pretrained with.

    None when neither is known.
    """
    return _stated_tokens(config) or RELATIVE_POSITIONS.get(str(config.get("model_type")))


def length_note(wanted: int | None, config: dict[str, Any]) -> str | None:
    """Returns a line for the user where a length had to be chosen: none was asked for and the model has no limit."""
    usual = usual_tokens(config)
    if wanted is not None or usual is None or context_tokens(config) is not None:
        return None
    return (
        f"{config['model_type']} has no longest row (it sees distances, not positions). Taken: {usual:,} tokens, "
        "as in its pretraining; --set training.max_seq_tokens=N for another."
    )


def _stated_tokens(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"):
        for place in places:
            if isinstance(place.get(key), int) and place[key] > 0:
                return int(place[key])
    return None


def is_encoder_decoder(config: dict[str, Any]) -> bool:
    """Returns whether the model has an encoder and a decoder (T5) rather than a decoder alone (Llama)."""
    return bool(config.get("is_encoder_decoder", config.get("model_type") in ("t5", "mt5", "umt5", "longt5", "bart")))


def weights_hash(folder: Path) -> str:
    """Returns a hash of the config and the weights, for the manifest.

    `sha256:...` over whole files up to 1 GiB in total; beyond that `sampled-sha256:...` over every file's size, its
    header (names, shapes, offsets of all tensors) and 64 blocks of 1 MiB, evenly spread. The sample tells models, and
    fine-tunes of one model, apart in under a second; it is no proof against somebody who changes single bytes.
    """
    files = [folder / "config.json", *weight_files(folder)]
    whole = sum(file.stat().st_size for file in files) <= FULL_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if whole or file.suffix == ".json" or size <= SAMPLES * SAMPLE_BYTES:
                while block := stream.read(SAMPLE_BYTES):
                    digest.update(block)
                continue
            digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for i in range(SAMPLES):
                stream.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return f"{'' if whole else 'sampled-'}sha256:{digest.hexdigest()}"


def _check_safetensors(file: Path) -> None:
    # layout: 8 bytes header length (little endian), a JSON header with byte ranges, the bytes
    size = file.stat().st_size
    again = "copy or download the file again"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            kind = "a Git LFS pointer" if file.read_bytes()[:12] == b"version http" else f"cut off at {size:,} bytes"
            raise ModelError(f"{file} is not a complete safetensors file: it is {kind}.", next_step=again)
        try:
            header = json.loads(stream.read(length))
            end = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{file} has a broken safetensors header.", next_step=again) from error
    if 8 + length + end != size:
        raise ModelError(
            f"{file} is not complete: its header describes {8 + length + end:,} bytes, it has {size:,}.",
            next_step=again,
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}", next_step="copy or download it again") from error
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}.", next_step="name a folder with a config.json that you may read"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object.", next_step="copy or download it again")
    return content


def _is_hub_name(name: str) -> bool:
    # `models/llama` beside an existing folder `models` is a mistyped path, not a Hub name
    return bool(HUB_NAME.fullmatch(name)) and not Path(name.split("/")[0]).is_dir()


def _offline_by_environment() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _missing_folder(name: str, path: Path) -> ModelError:
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    close = nearest(path.name, [*siblings, *(["nano"] if parent == Path(".") else [])])
    suggestion = None
    if close is not None:
        suggestion = "--model nano" if close == "nano" else f"--model {parent / close}"
    return ModelError(
        f"There is no model folder {name!r}.",
        allowed="nano, a folder with config.json and safetensors, or a Hub name (org/name)",
        next_step=suggestion or "--model nano",
    )


def _download(name: str, revision: str | None, offline: bool, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    unwanted = [*HUB_NOT, *(() if weights else ("*.safetensors",))]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=unwanted,
                local_files_only=offline,
            )
        )
    except errors.GatedRepoError as error:
        raise NetworkError(
            f"The Hub model {name} is gated: its owner has to grant you access.",
            next_step=f"accept the terms at https://huggingface.co/{name}, then: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The Hub model {name} has no revision {revision!r}.", allowed="a branch, tag or commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no Hub model {name} (or it is private), and no folder of that name.",
            next_step="check the name; for a private model: hf auth login",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if offline:
            raise NetworkError(
                f"{name} is a Hub name that is not in the local cache, and this run is offline.",
                allowed="a folder, a cached Hub name, or nano",
                next_step=f"go online once: hf download {name}",
            ) from error
        raise _unreachable(name, error) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: BaseException) -> NetworkError:
    reason = str(error).strip().split("\n")[0]
    return NetworkError(
        f"The Hub cannot be reached for {name}: {reason}",
        next_step="check the connection (and HF_ENDPOINT), or give a local folder; --model nano needs no network",
    )
