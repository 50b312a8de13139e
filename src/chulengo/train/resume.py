"""What may differ when a run is resumed, and which of its policies are chosen anew.

A run's folder says the policies that it was started with (config.yaml, resolved) and those that were asked for
(manifest.json). They change no number, so a resumed run chooses anew what was left to the plan, for the memory that is
free now, and keeps what the user insisted on.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chulengo.errors import DoesNotFitError

# none of it changes a number in the adapter (threads: in the last bits at most)
FREE_SETTINGS = frozenset((
    "out", "model.offline", "training.report_to", "training.keep_checkpoints", "training.save_every_steps",
    "training.log_every_steps", "model.cpu_threads", "model.weights_policy", "model.activations_policy",
    "model.embeddings_policy", "model.gpu_memory_limit", "model.retry_leaner",
))  # fmt: skip
# of the policies; graphs fill batches up, which may change the last bits
CHOSEN_ANEW = ("model.weights_policy", "model.activations_policy", "model.embeddings_policy")


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide an adapter's numbers, by `section.key`.

    Of the weights policy that is whether products are in FP8: a run cannot go on in the other arithmetic.
    """
    found = {key: value for key, value in settings.items() if key not in FREE_SETTINGS}
    if str(settings.get("model.weights_policy")).endswith("fp8"):
        found["model.weights_policy"] = "fp8"
    return found


def asked_policies(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the policies of a run as they were asked for (auto, fp8, or one insisted on), by `section.key`.

    A policy in config.yaml that is not the one the run wrote there was put there by hand, and is not among them.

    Args:
        folder: of the run.
        settings: of its config.yaml, by `section.key`.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        asked, written = manifest.get("asked", {}), manifest["config"]
        return {key: str(asked[key]) for key in CHOSEN_ANEW if key in asked and settings.get(key) == written.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # `check_same_run` says what is wrong with it


def advise_resumed(error: DoesNotFitError, out: str) -> None:
    """Makes advice for a new run, `--set …`, one that can be typed for the run that is resumed in `out`."""
    advice = error.next_step or ""
    changed = re.findall(r"--set ([^=\s]+)=", advice)
    if changed and set(changed) <= FREE_SETTINGS:
        error.advise(f"chulengo train --resume {shlex.quote(out)} {advice}")
    elif changed:
        error.advise(f"make room on the device and type the same again; or a new run with {advice}")
