"""Rows of a Hugging Face Hub data set, streamed through `datasets`.

Nothing here runs unless a Hub name was asked for. Streaming downloads no more than is read, and keeps no copy, so
offline only a set that `datasets.load_dataset` has once downloaded whole is found (its cache is read, no network).
Class labels come as their names, since `0` and `1` mean nothing to a language model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chulengo.data.types import Record
from chulengo.errors import DataError, NetworkError, nearest

_TRUE = {"1", "on", "yes", "true"}


def is_offline(offline: bool) -> bool:
    """Returns True when the caller or the environment (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE) forbids the network."""
    return offline or any(
        os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def hub_records(spec: str, split: str, offline: bool, near: str | None = None) -> Iterator[Record]:
    """Yields the rows of `org/name` or `org/name:config`, `source` being `org/name[split]#row`.

    Args:
        spec: the Hub name, with the configuration after a colon where the set has several.
        split: the split's name.
        offline: True: only what is in the local cache.
        near: an existing local path that looks like `spec`, for the error message.

    Raises:
        NetworkError: offline and not cached, or the Hub cannot be reached.
        DataError: the set, its configuration or its split does not exist, or its files cannot be read.
    """
    name, _, config = spec.partition(":")
    rows, label_names = _open(name, config or None, split, is_offline(offline), near)
    for number, row in enumerate(_checked(rows, spec), start=1):
        fields = {column: _named(value, label_names.get(column)) for column, value in row.items()}
        yield Record(fields, f"{spec}[{split}]#{number}")


def _open(
    name: str, config: str | None, split: str, offline: bool, near: str | None
) -> tuple[Any, dict[str, list[str]]]:
    import datasets

    local = f" There is no such path here either; the nearest is {near}." if near else ""
    try:
        with _network(offline):
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"The Hub has no data set {name} that you may read.{local}",
            next_step=f"look at https://huggingface.co/datasets/{name} ; for a gated set: hf auth login",
        ) from error
    except _network_errors() as error:
        raise _unreachable(name, offline, local, error) from error
    except ValueError as error:
        raise _refused(name, config, split, error) from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        raise _unreadable(name, error) from error
    features = rows.features or {}
    return rows, {
        column: list(feature.names) for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    }


@contextmanager
def _network(offline: bool) -> Iterator[None]:
    # `datasets` has no offline argument: it reads this switch of its own at each call, so it is set for one call
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _checked(rows: Any, spec: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from rows
    except _network_errors() as error:
        raise _unreachable(spec, False, "", error) from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(spec, error) from error


def _network_errors() -> tuple[type[Exception], ...]:
    # the Hub's client speaks through httpx in its 1.x versions and through httpx2 in 2.x; its own error names which
    from huggingface_hub.errors import HfHubHTTPError

    return ConnectionError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _unreachable(name: str, offline: bool, local: str, error: Exception) -> NetworkError:
    if offline:
        return NetworkError(
            f"{name} is a Hub data set, the run is offline, and the set is not in the local cache.{local}",
            allowed="offline: local files and folders, or sets that datasets.load_dataset downloaded before",
            next_step="take away --set model.offline=true (or HF_HUB_OFFLINE / HF_DATASETS_OFFLINE), or name a file",
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return NetworkError(
        f"The Hugging Face Hub cannot be reached to read {name}: {reason}.{local}",
        next_step="check the network (and HF_ENDPOINT, proxies), or download the set elsewhere and name its folder",
    )


def _refused(name: str, config: str | None, split: str, error: ValueError) -> DataError:
    text = str(error)
    splits = re.findall(r"'([^']+)'|\b(\w+)\b", text.partition("splits:")[2])
    if splits:
        names = [quoted or bare for quoted, bare in splits]
        close = nearest(split, names) or names[0]
        return DataError(
            f"{name} has no split '{split}'.",
            allowed=", ".join(names) + " (whole splits; data.num_rows takes a random part)",
            next_step=f"--set data.hub_split={close}",
        )
    configs = re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0])
    if configs:
        return DataError(
            f"{name} has no configuration '{config}'."
            if config
            else f"{name} has several configurations and one must be named.",
            allowed=", ".join(configs),
            next_step=f"--data {name}:{nearest(config or '', configs) or configs[0]}",
        )
    return _unreadable(name, error)


def _unreadable(name: str, error: Exception) -> DataError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return DataError(
        f"{name} cannot be read from the Hub: {reason}",
        next_step=f"look at https://huggingface.co/datasets/{name} , or download its files and name their folder",
    )


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 is how unlabelled rows are written
