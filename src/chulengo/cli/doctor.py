"""Says what this machine can do: devices, versions, what is missing, and what to type next.

  chulengo doctor
  chulengo doctor --json

Nothing is downloaded and nothing is changed. Exit status 0 when training can run here, 2 when it cannot.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# shapes as their config.json has them: what a GPU is measured against in the verdict
LANDMARKS: dict[str, dict[str, Any]] = {
    "Llama 2 7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama 2 13B": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "Llama 2 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
LANDMARK_TOKENS = 1024
NF4_ERROR_BOUND = 0.12  # rel-L2 of NF4 on normal numbers is 0.09 (QLoRA, block 64); a broken kernel is far off


@dataclass(frozen=True, slots=True)
class PackageState:
    """One dependency: what is installed against what is supported.

    Attributes:
        name: of the distribution.
        wanted: supported versions, as pyproject.toml has them.
        installed: version, or None.
        ok: whether the installed version is supported.
        extra: the extra it belongs to, or None for what is always needed.
    """

    name: str
    wanted: str
    installed: str | None
    ok: bool
    extra: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found and returns 0 when training can run here."""
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["can_train"] else 2


def examine() -> dict[str, Any]:
    """Returns everything the doctor looks at, as a JSON-able dict. Never raises for what is missing or broken."""
    packages = package_states(requirements())
    torch_state = _torch_state()
    devices = torch_state.pop("devices")
    found: dict[str, Any] = {
        "python": platform.python_version(), "platform": platform.platform(), **_host(),
        "torch": torch_state, "devices": devices, "packages": [asdict(package) for package in packages],
        "install": install_lines(packages), "bitsandbytes": _bitsandbytes_state(devices, torch_state["error"]),
        "attention": _attention(devices, torch_state["error"]), "engine": engine_state(devices, torch_state["error"]),
        "hub": hub_state(os.environ),
    }  # fmt: skip
    missing = [package.name for package in packages if package.extra is None and not package.ok]
    found["can_train"] = not missing and torch_state["error"] is None
    found["verdict"], found["next"] = verdict(found, missing)
    return found


def requirements() -> list[str]:
    """Returns Chulengo's requirement lines, extras included, from its metadata or, in a checkout, pyproject.toml."""
    try:
        lines = importlib.metadata.requires("chulengo")
    except importlib.metadata.PackageNotFoundError:
        lines = None
    if lines is not None:
        return lines
    project_file = Path(__file__).resolve().parents[3] / "pyproject.toml"
    if not project_file.is_file():
        return []
    import tomllib

    project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(f'{line}; extra == "{name}"' for name in extras for line in extras[name])]


def package_states(
    lines: Iterable[str], installed: Callable[[str], str | None] | None = None
) -> list[PackageState]:
    """Returns the state of each required package, those of extras after the others.

    Args:
        lines: requirements such as "torch>=2.11" or 'gguf>=0.10; extra == "export"'.
        installed: returns a package's version or None; None: what is installed here.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with transformers; without it there is little to compare anyway
        return [PackageState("packaging", "", None, False, None)]
    look = installed or _installed_version
    states = []
    for line in lines:
        requirement = Requirement(line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
        environment = {"extra": extra.group(1)} if extra else {"extra": ""}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        version = look(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        states.append(
            PackageState(requirement.name, str(requirement.specifier), version, ok, extra.group(1) if extra else None)
        )
    return sorted(states, key=lambda state: (state.extra or "", state.name.lower()))


def install_lines(packages: Iterable[PackageState]) -> dict[str, str]:
    """Returns what to type for everything that is missing: {"required" or an extra's name: pip line}."""
    lacking: dict[str, list[PackageState]] = {}
    for package in packages:
        if not package.ok:
            lacking.setdefault(package.extra or "required", []).append(package)
    lines = {}
    for group, missing in lacking.items():
        if group == "required":
            lines[group] = "pip install " + " ".join(f"'{package.name}{package.wanted}'" for package in missing)
        else:
            lines[group] = f"pip install {_install_target(group)}"
    return lines


def checkout(package: Path | None = None) -> Path | None:
    """Returns the root of the source checkout whose code is running, or None when it is an installed copy.

    Where the running code lies decides, not what pip recorded: an editable install and `PYTHONPATH=src` both run the
    checkout, and `pip install chulengo` there would put another copy beside it.

    Args:
        package: folder of the package; None: this one's.
    """
    package = package or Path(__file__).resolve().parents[1]
    root = package.parent.parent
    project_file = root / "pyproject.toml"
    if package.parent.name != "src" or not project_file.is_file():
        return None
    import tomllib

    try:
        name = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return root if name == "chulengo" else None


def _install_target(extra: str) -> str:
    root = checkout()
    if root is None:
        return f"'chulengo[{extra}]'"
    return "-e " + shlex.quote(f"{'.' if root == Path.cwd() else root}[{extra}]")


def hub_state(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns where the Hub cache is, whether the Hub may be used, and whether there is a token (never the token)."""
    home = Path(environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser()
    token_file = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    models = sorted(entry.name for entry in cache.glob("models--*")) if cache.is_dir() else []
    has_token = bool(environment.get("HF_TOKEN")) or (token_file.is_file() and token_file.stat().st_size > 0)
    return {"cache": str(cache), "cached_models": len(models), "offline": offline, "token": has_token}


def verdict(found: Mapping[str, Any], missing: list[str]) -> tuple[str, str]:
    """Returns one sentence on what this machine can do, and what to type next."""
    if missing:
        return f"Training cannot run yet: {', '.join(missing)} missing or of an unsupported version.", found["install"][
            "required"
        ]
    if found["torch"]["error"] is not None:
        return "Training cannot run: torch does not load.", "pip install --force-reinstall torch"
    works = found["bitsandbytes"]
    gpus = [device for device in found["devices"] if device["kind"] == "cuda"]
    if not gpus:
        quantised = "" if works.get("cpu") == "works" else ", unquantised only (bitsandbytes does not work here)"
        return f"CPU only: the embedded model and other small ones train here{quantised}.", "chulengo demo"
    best = max(gpus, key=lambda device: device["free_bytes"])
    if works.get(best["device"]) != "works":
        return (
            f"{best['name']} is here but bitsandbytes does not work on it: {works.get(best['device'])}",
            "pip install --upgrade bitsandbytes",
        )
    fitting = fitting_models(best["free_bytes"], best["bf16"])
    largest = f"QLoRA of models up to {fitting[-1]} fits" if fitting else "QLoRA of small models fits"
    bf16 = "" if best["bf16"] else ", in fp16 (no bfloat16)"
    return (
        f"{best['name']}: {largest} ({LANDMARK_TOKENS:,} tokens at a time, recompute){bf16}.",
        "chulengo demo, then: chulengo plan --model M --data D",
    )


def fitting_models(free_bytes: int, has_bf16: bool) -> list[str]:
    """Returns which Llama 2 sizes fit with NF4, one row of LANDMARK_TOKENS and recomputation, smallest first."""
    from chulengo.model.plan import TrainingMemory, needed_bytes, predict_memory

    settings = TrainingMemory(
        batch_size=1, row_tokens=LANDMARK_TOKENS, gradient_checkpointing=True, optimizer="paged_adamw_8bit",
        compute_dtype="bfloat16" if has_bf16 else "float16",
    )  # fmt: skip
    shared = {"model_type": "llama", "vocab_size": 32000}
    return [
        name for name, shape in LANDMARKS.items()
        if needed_bytes(predict_memory(shared | shape, settings)) <= free_bytes
    ]  # fmt: skip


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _host() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "disk_free_bytes": shutil.disk_usage(".").free, "ram_bytes": None, "ram_free_bytes": None,
    }  # fmt: skip
    try:
        import psutil
    except ImportError:
        return facts  # the package table says that it is missing
    memory = psutil.virtual_memory()
    return facts | {"ram_bytes": memory.total, "ram_free_bytes": memory.available}


def _torch_state() -> dict[str, Any]:
    """Returns whether torch loads, and the devices it sees; a broken torch is a finding, not a crash."""
    from chulengo.train.manifest import cpu_model, cuda_driver

    cpu = {"device": "cpu", "kind": "cpu", "name": cpu_model()}
    state: dict[str, Any] = {"error": None, "cuda": None, "driver": cuda_driver(), "devices": [cpu]}
    try:
        import torch

        state["cuda"] = torch.version.cuda
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            facts = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            state["devices"].append({
                "device": f"cuda:{index}", "kind": "cuda", "name": facts.name, "free_bytes": free, "total_bytes": total,
                "capability": f"{facts.major}.{facts.minor}", "bf16": facts.major >= 8,
            })
    except Exception as error:  # noqa: BLE001 - a library that fails to load raises anything: OSError, RuntimeError ...
        state["error"] = _short(error)
    return state


def _bitsandbytes_state(devices: Iterable[Mapping[str, Any]], torch_error: str | None) -> dict[str, str]:
    """Returns for each device `works`, or why not: a small matrix goes to NF4 and back."""
    if torch_error is not None:
        return {device["device"]: "not tried: torch does not load" for device in devices}
    return {device["device"]: _nf4_round_trip(device["device"]) for device in devices}


def _nf4_round_trip(device: str) -> str:
    try:
        import torch

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels that it lacks
        from bitsandbytes import functional

        values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
        codes, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        back = functional.dequantize_4bit(codes, state)
        distance = float((back - values).norm() / values.norm())
    except Exception as error:  # noqa: BLE001 - whatever its native library raises is the finding
        return _short(error)
    return "works" if distance < NF4_ERROR_BOUND else f"wrong numbers: NF4 round trip is off by {distance:.0%}"


def _attention(devices: Iterable[Mapping[str, Any]], torch_error: str | None) -> list[str]:
    """Returns the attention implementations that `model.attention` can name here."""
    if torch_error is not None:
        return []
    import torch

    found = ["eager", "sdpa"]
    if any(device["kind"] == "cuda" for device in devices):
        backends: Any = torch.backends.cuda  # untyped functions
        kernels = [
            name for name, on in (
                ("flash", backends.flash_sdp_enabled()), ("memory-efficient", backends.mem_efficient_sdp_enabled()),
                ("cudnn", backends.cudnn_sdp_enabled()),
            ) if on
        ]  # fmt: skip
        found[1] = f"sdpa ({', '.join(kernels)})"
        if importlib.util.find_spec("flash_attn") is not None:
            found.append("flash_attention_2")
    return found


def engine_state(devices: Iterable[Mapping[str, Any]], torch_error: str | None) -> dict[str, str]:
    """Returns which engine `auto` takes here for what the fast one covers, which kernels it runs, and why.

    Args:
        devices: as `examine` lists them.
        torch_error: why torch does not load, or None.
    """
    if torch_error is not None:
        return {"name": "none", "kernels": "none", "why": "torch does not load"}
    from chulengo.kernels import ops

    gpus = [device for device in devices if device["kind"] == "cuda"]
    choices = ops.describe(gpus[0]["device"] if gpus else "cpu")
    kernels = "fused" if choices[0].backend == "fused" else "plain PyTorch"
    if gpus and not gpus[0]["bf16"]:
        return {"name": "reference", "kernels": "none", "why": f"the fast one needs bfloat16, which {gpus[0]['name']} "
                "does not have"}
    if gpus and choices[0].backend != "fused":
        return {"name": "reference", "kernels": "none", "why": f"the fast one's kernels do not run: {choices[0].why}"}
    return {"name": "fast", "kernels": kernels, "why": choices[0].why}


def _short(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:160]}"


def _print(found: Mapping[str, Any]) -> None:
    try:
        from rich.console import Console
    except ImportError:  # exactly the machine that needs a doctor
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False)
    console.print(_machine_table(found))
    console.print(_package_table(found["packages"]))
    if "required" in found["install"]:
        console.print(found["install"]["required"], style="red", markup=False, soft_wrap=True)
    for line in _extra_lines(found):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    console.print()
    console.print(found["verdict"], style="bold green" if found["can_train"] else "bold red", markup=False)
    console.print(f"Next: {found['next']}", markup=False)


def _machine_table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, show_edge=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    ram = f"{_gib(found['ram_free_bytes'])} of {_gib(found['ram_bytes'])} free"
    rows = [
        ("python", f"{found['python']}  ({sys.executable})"),
        ("platform", found["platform"]),
        ("memory", f"{ram}, {found['cpu_cores']} CPU cores; disk here: {_gib(found['disk_free_bytes'])} free"),
    ]
    for device in found["devices"]:
        rows.append((device["device"], _device_text(device, found["bitsandbytes"].get(device["device"], ""))))
    state = found["torch"]
    if state["error"]:
        rows.append(("torch", f"does not load: {state['error']}"))
    else:
        rows.append(("CUDA", f"torch built for {state['cuda'] or 'CPU only'}, driver {state['driver'] or 'none'}"))
        rows.append(("attention", ", ".join(found["attention"])))
        engine = found["engine"]
        kernels = f", {engine['kernels']} kernels" if engine["name"] == "fast" else ""
        rows.append(("engine", f"{engine['name']}{kernels} ({engine['why']})"))
    hub = found["hub"]
    access = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "allowed when asked for"
    token = "there is a token" if hub["token"] else "no token (gated models need one: hf auth login)"
    models = "1 model" if hub["cached_models"] == 1 else f"{hub['cached_models']} models"
    rows.append(("Hub", f"{access}; {token}; {models} in {hub['cache']}"))
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _device_text(device: Mapping[str, Any], quantised: str) -> str:
    bits = "NF4 works" if quantised == "works" else f"NF4: {quantised}"
    if device["kind"] == "cpu":
        return f"{device['name']}; {bits}"
    memory = f"{_gib(device['free_bytes'])} of {_gib(device['total_bytes'])} free"
    return f"{device['name']}, {memory}, capability {device['capability']}, bf16 {_yes(device['bf16'])}; {bits}"


def _package_table(packages: Iterable[Mapping[str, Any]]) -> Any:
    """Returns the table of what is always needed; extras are a line each."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for heading in ("package", "supported", "installed"):
        table.add_column(heading)
    for package in packages:
        if package["extra"] is None:
            state = package["installed"] or "missing"
            shown = f"[green]{state}[/]" if package["ok"] else f"[red]{state}  (not supported)[/]"
            table.add_row(package["name"], package["wanted"] or "any", shown)
    return table


def _extra_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for extra in dict.fromkeys(p["extra"] for p in found["packages"] if p["extra"] is not None):
        lacking = [p["name"] for p in found["packages"] if p["extra"] == extra and not p["ok"]]
        state = f"lacks {', '.join(lacking)}: {found['install'][extra]}" if lacking else "complete"
        lines.append(f"extra {extra}: {state}")
    return lines


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / (1 << 30):.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
