"""Dropout: Philox against its published answers, masks that are fair and independent, and fused bit-equal to plain."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from measure import mutant, normal
from torch import Tensor

from chulengo.kernels import ops
from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import dropout as reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 64), (1, 1), (3, 100), (2, 2100), (0, 8), (5, 7)]
SEEDS = [2**40 + 5, -3]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import dropout

    return dropout


def seed_of(number: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([number], dtype=torch.int64, device=device)


def both(module: ModuleType, x: Tensor, seed: int, place: int, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Returns d(x), and 0.7 d(x) added to something."""
    total = x.flip(0).clone()
    module.add_(total, x, 0.7, share, seed_of(seed, x.device), place)
    return module.forward(x, share, seed_of(seed, x.device), place), total


# of Random123's known answers; words of zeros, of ones, and of pi
@pytest.mark.parametrize(
    ("key", "counter", "rounds", "words"),
    [
        (0, [0] * 4, 7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0, [0] * 4, 10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (-1, [0xFFFFFFFF] * 4, 10, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0A4093822, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 10,
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_gives_its_published_answers(key: int, counter: list[int], rounds: int, words: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert [int(word) for word in reference.philox(seed_of(key), (c0, c1, c2, c3), rounds)] == words


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_masks_keep_the_share_that_they_say(share: float) -> None:
    kept = reference.mask(1000, 4096, share, seed_of(11), 3).double()
    # five standard errors of 4,096,000 draws, of a row's and of a column's
    deviation = (share * (1 - share)) ** 0.5
    assert abs(float(kept.mean()) - (1 - share)) < 5 * deviation / kept.numel() ** 0.5
    for dim, count in ((0, 1000), (1, 4096)):
        means = kept.mean(dim)
        assert float((means - (1 - share)).abs().max()) < 5 * deviation / count**0.5
        # and they scatter as independent draws do: the variance of means, to 5 standard errors of a variance
        assert float(means.var() / (deviation**2 / count)) == pytest.approx(1, abs=5 * (2 / len(means)) ** 0.5)


def test_values_are_uniform() -> None:
    words = torch.cat([w.flatten() for w in reference.philox(
        seed_of(5), (torch.arange(4096)[None], torch.arange(64)[:, None], torch.tensor(2), torch.tensor(0)), 7
    )])  # fmt: skip
    for values in (words >> 24, (words >> 8) & 255, words & 255):
        counts = torch.bincount(values, minlength=256).double()
        expected = len(values) / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_other_seeds_places_rows_and_columns_are_independent() -> None:
    shape, share = (512, 1024), 0.5
    plain = reference.mask(*shape, share, seed_of(7), 9)
    others = {f"seed {seed}": reference.mask(*shape, share, seed_of(seed), 9) for seed in (6, 8, 7 + 2**32, -7)}
    others |= {f"place {place}": reference.mask(*shape, share, seed_of(7), place) for place in (8, 10, 9 + 2**16)}
    others |= {f"row {n}": plain.roll(n, 0) for n in (1, 2, 256)}
    # an eighth of the row is where the halves of one word, and the words of one counter, lie
    others |= {f"column {n}": plain.roll(n, 1) for n in (1, 2, 128, 256, 512)}
    signs = plain.double() * 2 - 1
    for name, other in others.items():
        correlation = float((signs * (other.double() * 2 - 1)).mean())
        assert abs(correlation) < 5 / plain.numel() ** 0.5, (name, correlation)


def test_a_mask_does_not_depend_on_how_many_rows_there_are() -> None:
    long = reference.mask(3000, 96, 0.2, seed_of(3), 1)
    assert torch.equal(long[:7], reference.mask(7, 96, 0.2, seed_of(3), 1))


def test_what_is_dropped_and_scaled() -> None:
    x = normal(6, 40, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    kept = reference.mask(6, 40, 0.25, seed_of(4), 2)
    dropped, total = both(reference, x, 4, 2, share=0.25)
    assert torch.equal(dropped, torch.where(kept, x * (1 / 0.75), torch.zeros(())))
    torch.testing.assert_close(total, x.flip(0) + 0.7 * dropped)
    assert torch.equal(reference.forward(x, 0.0, seed_of(4), 2), x)
    poisoned = torch.where(kept, x, torch.full_like(x, float("nan")))
    assert torch.equal(reference.forward(poisoned, 0.25, seed_of(4), 2), dropped)
    assert torch.equal(ops.dropout(x, 0.25, seed_of(4), 2), dropped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_plain_bit_for_bit(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    x = normal(*shape, dtype=dtype, device=device, seed=2)
    for number, seed in enumerate(SEEDS):
        for plain, own in zip(both(reference, x, seed, 16 * number + 1), both(fused, x, seed, 16 * number + 1),
                              strict=True):  # fmt: skip
            assert torch.equal(plain, own)


def test_rows_may_be_farther_apart(device: torch.device, fused: ModuleType) -> None:
    wide = normal(5, 96, dtype=torch.float32, device=device, seed=3)
    for plain, own in zip(both(reference, wide[:, 8:72], 5, 6), both(fused, wide[:, 8:72], 5, 6), strict=True):
        assert torch.equal(plain, own)


def test_what_does_not_apply_is_named(device: torch.device, fused: ModuleType) -> None:
    x = torch.ones(4, 8, device=device)
    for module in (reference, fused):
        with pytest.raises(KernelError, match="int64"):
            module.forward(x, 0.1, seed_of(1, device).int(), 0)
        with pytest.raises(KernelError, match="not including, 1"):
            module.forward(x, 1.0, seed_of(1, device), 0)
        with pytest.raises(KernelError, match="one shape"):
            module.add_(x[:2], x, 1.0, 0.1, seed_of(1, device), 0)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("zero + row, zero + place", "zero, zero + place"), id="all rows alike"),
        pytest.param(("zero + row, zero + place", "zero + row, zero"), id="all maps alike"),
        pytest.param(("tl.load(seed_ptr)", "0"), id="no seed"),
        pytest.param((">> (16 * half)", ">> 0"), id="one half of a word twice"),
        pytest.param((">= threshold", "> threshold + 650"), id="a hundredth more dropped"),
        pytest.param(("factor / (1 - dropout)", "factor"), id="not scaled"),
        pytest.param(("ROUNDS=ROUNDS", "ROUNDS=ROUNDS - 1"), id="a round less"),
    ],
)
def test_named_wrong_kernels_fail(edit, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    wrong, x = mutant(fused, [edit], tmp_path), normal(8, 512, dtype=torch.float32, device=device, seed=2)
    expected, *found = (module.forward(x, 0.3, seed_of(5, device), 6) for module in (reference, fused, wrong))
    assert [torch.equal(each, expected) for each in found] == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 11008), (1001, 4096), (77, 1000)])
def test_large(shape: tuple[int, int], dtype: torch.dtype, fused: ModuleType) -> None:
    x = normal(*shape, dtype=dtype, device=torch.device("cuda"), seed=2)
    for plain, own in zip(both(reference, x, 2**50 + 1, 127), both(fused, x, 2**50 + 1, 127), strict=True):
        assert torch.equal(plain, own)
