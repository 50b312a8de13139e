"""Dropout (https://jmlr.org/papers/v15/srivastava14a.html) whose mask is computed from its place and never kept.

    d(x)[t, i] = x[t, i] / (1 - p) where kept, else 0          kept: number(seed, place, t, i) >= round(65536 p)

The number is one of Philox4x32 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), a cipher-like function
of a key and a counter. The key is the seed of the micro-step, the counter (column, row, place, 0), where a place is
one map of the model. So a mask is the same whenever and wherever it is asked for: computed again in a backward, on
another device, after a resume; and two maps, rows or steps never share a number. No random state exists.

Why Philox: the values of all rows can be made at once, it needs 32-bit products only, and its quality is known: seven
rounds are the fewest that pass every test of BigCrush, by the paper. Seven it is here; ten are a margin that masks do
not need. A 64-bit hash of the index would be as short, but would have to be tested by ourselves.

One counter gives 128 bits, eight values of 16 bits, for eight columns of a row that lie an eighth of its width apart:
a kernel then reads and writes eight contiguous pieces. 16 bits hold p to 2**-17. Values are scaled by 1 / (1 - p),
with p as it was given, as PyTorch does.

Here 32-bit words stand in int64 tensors, whose products are right modulo 2**64 though their sign is not.

Legend: T tokens, I features, E an eighth of the features, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chulengo.kernels.applies import need, need_same

ROUNDS = 7
LEVELS = 65536  # a value is 16 bits
VALUES = 8  # of one counter
LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # Philox4x32's constants
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
CHUNK = 1 << 15  # counters at once: 8 ns a value on one core; all at once 10, 1 << 12 20 (512 x 1,024 values)


def threshold(dropout: float) -> int:
    """Returns the first 16-bit value that is kept."""
    return round(dropout * LEVELS)


def check(x_TI: Tensor, seed_1: Tensor, dropout: float) -> None:
    """Raises `KernelError` unless the operands fit each other."""
    need(x_TI.dim() == 2, f"x has shape {tuple(x_TI.shape)}.", allowed="[T, I]")
    need(
        seed_1.dtype == torch.int64 and seed_1.numel() == 1 and seed_1.device == x_TI.device,
        f"The seed is {tuple(seed_1.shape)} {seed_1.dtype} on {seed_1.device}.",
        allowed=f"int64 [1] on {x_TI.device}",
    )
    need(0 <= dropout < 1, f"The dropout is {dropout}.", allowed="0 up to, not including, 1")


def philox(seed_1: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int) -> tuple[Tensor, ...]:
    """Returns four random words for each counter, int64 tensors of values below 2**32.

    Args:
        seed_1: int64 [1]; its low and high 32 bits are the key.
        counter: four words each, int64 tensors that broadcast.
        rounds: of the cipher.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed_1 & LOW, (seed_1 >> 32) & LOW
    for _ in range(rounds):
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (right >> 32).bitwise_and_(LOW) ^ c1, (left >> 32).bitwise_and_(LOW) ^ c3
        c0, c2 = c0.bitwise_xor_(k0), c2.bitwise_xor_(k1)
        c1, c3 = right.bitwise_and_(LOW), left.bitwise_and_(LOW)
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def mask(num_rows: int, num_features: int, dropout: float, seed_1: Tensor, place: int) -> Tensor:
    """Returns which values are kept, bool [T, I].

    Args:
        num_rows: T.
        num_features: I.
        dropout: the share of values that is not.
        seed_1: int64 [1], on the device where the mask is made.
        place: of the map in the model, 0 up to 2**31.
    """
    device = seed_1.device
    eighth = -(-num_features // VALUES)
    column_1E = torch.arange(eighth, device=device)[None, :]
    rest = torch.full((1, 1), place, device=device), torch.zeros((1, 1), dtype=torch.int64, device=device)
    kept_TI = torch.empty((num_rows, num_features), dtype=torch.bool, device=device)
    first = threshold(dropout)
    rows = max(1, CHUNK // max(eighth, 1)) if device.type == "cpu" else max(1, num_rows)
    for start in range(0, num_rows, rows):
        row_T1 = torch.arange(start, min(start + rows, num_rows), device=device)[:, None]
        words = philox(seed_1, (column_1E, row_T1, *rest), ROUNDS)
        halves = [half for word in words for half in (word & (LEVELS - 1), word >> 16)]
        kept_TI[start : start + rows] = torch.cat(halves, dim=1)[:, :num_features] >= first
    return kept_TI


def forward(x_TI: Tensor, dropout: float, seed_1: Tensor, place: int) -> Tensor:
    """Returns d(x), [T, I] in the dtype of x.

    Args:
        x_TI: float32, bfloat16 or float16.
        dropout: the share of values that becomes 0.
        seed_1: int64 [1] on the device of x: of the micro-step.
        place: of the map in the model, 0 up to 2**31.
    """
    check(x_TI, seed_1, dropout)
    kept_TI = mask(x_TI.shape[0], x_TI.shape[1], dropout, seed_1, place)
    return torch.where(kept_TI, x_TI * (1 / (1 - dropout)), 0)


def add_(sum_TI: Tensor, x_TI: Tensor, factor: float, dropout: float, seed_1: Tensor, place: int) -> None:
    """Adds `factor * d(x)` to `sum_TI`, rounded once: how the gradient of a dropped input arrives.

    Args:
        sum_TI: written.
        x_TI: in the dtype of `sum_TI`.
        factor: of what is added.
        dropout: as in `forward`.
        seed_1: as in `forward`.
        place: as in `forward`.
    """
    check(x_TI, seed_1, dropout)
    need_same("the sum", sum_TI, "x", x_TI)
    kept_TI = mask(x_TI.shape[0], x_TI.shape[1], dropout, seed_1, place)
    scaled_TI = torch.where(kept_TI, x_TI.float() * (factor / (1 - dropout)), 0)
    sum_TI.copy_(sum_TI.float() + scaled_TI)
