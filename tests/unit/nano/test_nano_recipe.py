"""The demo's recipe ships inside the package, and is the one that the recipes folder shows."""

from __future__ import annotations

from pathlib import Path

from chulengo import nano


def test_the_shipped_recipe_is_the_shown_one() -> None:
    shown = Path(__file__).resolve().parents[3] / "recipes" / "nano_demo_cpu.yaml"
    assert nano.demo_recipe().read_bytes() == shown.read_bytes()
