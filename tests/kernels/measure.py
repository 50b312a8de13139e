"""The two error measures of every kernel test, and kernels that are wrong on purpose.

A result passes when its relative L2 error and its largest error over the rms of the exact values are both at
most twice those of plain PyTorch in the same dtype, and the first is below a ceiling: 1e-5 in float32, 1e-2 in
bfloat16. "Exact" is float64 on the same rounded inputs. In float32, plain PyTorch is sometimes exact by luck on a
few values, so eight roundings (4.8e-7, a twentieth of the ceiling) are always allowed there, and the square root of the
number of terms where each value is a long sum, which libraries add in other orders; in 16 bits nothing is.

A test that every kernel passes proves nothing, so each operation also names wrong kernels, made by editing one
expression of the source, and shows that the same check refuses them.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

CEILING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EIGHT_ROUNDINGS = 8 * 2.0**-24
_numbers = itertools.count()


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Returns the relative L2 error and the largest error over the rms of `exact`."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    assert value.shape == exact.shape, (tuple(value.shape), tuple(exact.shape))
    # outputs are scaled to an rms near 1, which is what an error is held against where the exact ones are all zeros
    difference, rms = value - exact, exact.square().mean().sqrt() if exact.any() else torch.ones((), dtype=exact.dtype)
    return (difference.square().mean().sqrt() / rms).item(), (difference.abs().max() / rms).item()


def faults(
    values: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], terms: int = 1
) -> list[str]:
    """Returns a line for each tensor that is not as near to `exact` as plain PyTorch is; [] when all pass.

    `terms` is how many numbers are added up for one value.
    """
    assert values.keys() == exact.keys() == plain.keys(), (values.keys(), exact.keys(), plain.keys())
    lines = []
    for name, value in values.items():
        got, usual, dtype = errors(value, exact[name]), errors(plain[name], exact[name]), value.dtype
        allowed, ceiling = [2 * error for error in usual], CEILING[dtype]
        if dtype == torch.float32:
            largest = errors(torch.zeros_like(value), exact[name])[1] or 1.0
            roundings = max(EIGHT_ROUNDINGS, terms**0.5 * 2.0**-24)
            allowed = [max(allowed[0], roundings), max(allowed[1], roundings * largest)]
        # written so that NaN fails
        if not (got[0] <= allowed[0] and got[1] <= allowed[1] and got[0] <= ceiling):
            lines.append(
                f"{name}: rel-L2 {got[0]:.2e} (plain {usual[0]:.2e}, ceiling {ceiling:.0e}), "
                f"max/rms {got[1]:.2e} (plain {usual[1]:.2e})"
            )
    return lines


def mutant(module: ModuleType, edits: Sequence[tuple[str, str]], folder: Path) -> ModuleType:
    """Returns a copy of `module` with each `old` text replaced by `new`; every `old` must occur."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source, f"{module.__name__} no longer contains {old!r}"
        source = source.replace(old, new)
    name = f"mutant_{next(_numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    """Returns seeded normal values times `scale`, made on the CPU so that every device sees the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)
