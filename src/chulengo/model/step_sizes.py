"""The few sizes that a graph's batches are filled up to: one rule for the step and, without torch, for the plan."""

from __future__ import annotations

LEAST_STEP = 256  # tokens
# of a run: a graph takes memory of the device that PyTorch does not count; batches of rarer sizes run without one
MOST_GRAPHS = 32
GRAPH_BYTES = 8 << 20  # of one: 4 to 8 MiB of Llama 2 7B on an H200, by what the device had left
PACKED_GRAPHS = 20  # packs are nearly full: three epochs of guanaco-llama2-1k have 10 sizes, one pack at a time 17


def size_step(tokens: int) -> int:
    """Returns what tokens and the longest sequence of a graph's batch are multiples of.

    An eighth of the next power of two, so that the sizes of a run stay few however large its batches are: each is
    captured once, in the time that the host needs to launch a step.

    Args:
        tokens: of the batch.
    """
    return max(LEAST_STEP, (1 << max(tokens - 1, 0).bit_length()) // 8)


def filled_up(number: int, step: int | None = None) -> int:
    """Returns the next multiple of a step, None: of the step for that many tokens."""
    step = size_step(number) if step is None else step
    return -(-number // step) * step


def num_graphs(tokens: int, *, packed: bool) -> int:
    """Returns how many graphs a run may have.

    For every number of tokens some four: longest sequences and targets differ too. Three epochs of guanaco-llama2-1k
    by length have 7 sizes in batches of up to 512 tokens, 20 of 2,048, 36 of 8,192.

    Args:
        tokens: of a full batch.
        packed: whether most are nearly full.
    """
    sizes = size = 0
    while size < tokens:
        size += size_step(size + 1)
        sizes += 1
    return min(PACKED_GRAPHS if packed else MOST_GRAPHS, 4 * sizes)
