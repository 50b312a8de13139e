from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chulengo.cli import doctor
from chulengo.cli.main import main

SRC = Path(__file__).resolve().parents[3] / "src"


def _doctor(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(path), str(SRC)])
    return subprocess.run(
        [sys.executable, "-m", "chulengo", "doctor", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip


def test_json_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["can_train"] else 2)
    torch = next(package for package in found["packages"] if package["name"] == "torch")
    assert torch["installed"]
    assert torch["ok"]
    assert found["bitsandbytes"]["cpu"] == "works"
    assert "eager" in found["attention"]
    assert found["devices"][0]["kind"] == "cpu"
    assert found["disk_free_bytes"] > 0
    assert found["next"]


def test_the_screen_has_a_verdict_and_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    out = capsys.readouterr().out
    for part in ("python", "NF4 works", "transformers", "extra eval:", "Next: ", "engine"):
        assert part in out


def test_a_broken_torch_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = _doctor(tmp_path)
    assert done.returncode == 2
    assert "does not load: OSError: libcudart.so.13" in done.stdout
    assert "Training cannot run: torch does not load." in done.stdout
    assert "Traceback" not in done.stderr


def test_a_bitsandbytes_with_wrong_numbers_is_found(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("")
    (tmp_path / "bitsandbytes" / "functional.py").write_text(
        "def quantize_4bit(values, **_): return values, None\ndef dequantize_4bit(codes, state): return codes * 0.5\n"
    )
    found = json.loads(_doctor(tmp_path, "--json").stdout)
    assert found["bitsandbytes"]["cpu"] == "wrong numbers: NF4 round trip is off by 50%"
    assert "bitsandbytes does not work" in found["verdict"] or found["devices"][1:]


def test_packages_against_supported_versions() -> None:
    installed = {"torch": "2.10.0", "peft": "0.21.5", "gguf": None, "triton": "3.7"}
    states = doctor.package_states(
        ["torch>=2.11", "peft>=0.21,<0.22", 'gguf>=0.10; extra == "export"', 'triton>=3.6; extra == "gpu"',
         'wheel; python_version < "3"'],
        installed.get,
    )  # fmt: skip
    assert {state.name: state.ok for state in states} == {"torch": False, "peft": True, "gguf": False, "triton": True}
    lines = doctor.install_lines(states)
    assert set(lines) == {"required", "export"}
    assert lines["required"] == "pip install 'torch>=2.11'"


def test_extras_are_installed_into_the_checkout_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = doctor.PackageState("gguf", ">=0.10", None, False, "export")
    monkeypatch.chdir(tmp_path)
    assert doctor.install_lines([state])["export"] == f"pip install -e '{SRC.parent}[export]'"
    monkeypatch.chdir(SRC.parent)
    assert doctor.install_lines([state])["export"] == "pip install -e '.[export]'"
    monkeypatch.setattr(doctor, "checkout", lambda: None)
    assert doctor.install_lines([state])["export"] == "pip install 'chulengo[export]'"


def test_what_a_checkout_is(tmp_path: Path) -> None:
    assert doctor.checkout() == SRC.parent
    installed = tmp_path / "lib" / "site-packages" / "chulengo"
    assert doctor.checkout(installed) is None
    package = tmp_path / "src" / "chulengo"  # somebody else's project that ships a copy
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert doctor.checkout(package) is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "chulengo"\n')
    assert doctor.checkout(package) == tmp_path


def test_every_extra_of_the_project_is_known() -> None:
    extras = {state.extra for state in doctor.package_states(doctor.requirements())}
    assert {None, "gpu", "eval", "serve", "export", "train-extras", "dev"} <= extras


def test_a_missing_requirement_decides_the_verdict() -> None:
    states = doctor.package_states(["peft>=0.21"], lambda name: None)
    found: dict[str, Any] = {"install": doctor.install_lines(states)}
    said, then = doctor.verdict(found, ["peft"])
    assert "peft missing" in said
    assert then == "pip install 'peft>=0.21'"


def test_the_token_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secretsecret")
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    state = doctor.hub_state({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert state == {"cache": str(tmp_path / "hub"), "cached_models": 1, "offline": True, "token": True}
    assert "secret" not in json.dumps(state)


@pytest.mark.parametrize(("gib", "fitting"), [
    (4, []), (8, ["Llama 2 7B"]), (24, ["Llama 2 7B", "Llama 2 13B"]),
    (80, ["Llama 2 7B", "Llama 2 13B", "Llama 2 70B"]),
])  # fmt: skip
def test_which_models_fit(gib: int, fitting: list[str]) -> None:
    assert doctor.fitting_models(gib << 30, True) == fitting


def test_the_verdict_for_a_gpu() -> None:
    gpu = {"device": "cuda:0", "kind": "cuda", "name": "RTX 4090", "free_bytes": 23 << 30, "bf16": True}
    found = {
        "torch": {"error": None}, "devices": [{"device": "cpu", "kind": "cpu", "name": "x"}, gpu],
        "bitsandbytes": {"cpu": "works", "cuda:0": "works"}, "install": {},
    }  # fmt: skip
    assert doctor.verdict(found, [])[0].startswith("RTX 4090: QLoRA of models up to Llama 2 13B fits")
    found["bitsandbytes"]["cuda:0"] = "RuntimeError: no kernel image"  # type: ignore[index]
    assert "bitsandbytes does not work on it: RuntimeError: no kernel image" in doctor.verdict(found, [])[0]


def test_which_engine_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.kernels import ops

    gpu = {"device": "cuda:0", "kind": "cuda", "name": "Some GPU", "bf16": True}
    cpu = {"device": "cpu", "kind": "cpu", "name": "CPU"}
    assert doctor.engine_state([cpu], None) == {
        "name": "fast", "kernels": "plain PyTorch", "why": "Triton does not compile for cpu",
    }  # fmt: skip
    assert doctor.engine_state([cpu], "OSError: broken")["name"] == "none"
    monkeypatch.setattr(ops, "describe", lambda device: [ops.OpChoice("rms_norm", "fused", "CUDA device and Triton")])
    assert doctor.engine_state([cpu, gpu], None)["kernels"] == "fused"
    old = doctor.engine_state([cpu, gpu | {"bf16": False}], None)
    assert (old["name"], old["why"]) == ("reference", "the fast one needs bfloat16, which Some GPU does not have")
    monkeypatch.setattr(ops, "describe", lambda device: [ops.OpChoice("rms_norm", "reference", "no Triton")])
    assert doctor.engine_state([cpu, gpu], None)["why"] == "the fast one's kernels do not run: no Triton"
