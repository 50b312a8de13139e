"""How many tokens of prompts and answers the fast engine may hold at once on a GPU.

The cache of keys and values is what grows without being asked: 512 KiB a token for Llama 2 7B, 8 GiB for eight rows of
2,048. Who trained in little memory had a reason, so answers stay below what the adapter's training took, and always
below what this process may take of the device. Of that goes what is there once the model is loaded, and what is taken
at first use: the matrices that are not written yet (streamed: one buffer, of the largest group) and cuBLAS'
workspaces. The rest is for tokens, and each is counted with all that comes with it:

- its keys and values in every layer, and twice more in one: a cache that grows, or that rows leave, is copied a layer
  at a time;
- its part of its row's logits, in all the forms that drawing a token from them takes;
- the states of a layer while prompts are read, in the middle of its MLP, where they are most. Only so many tokens are
  read at a time as fit, and never more than `PROMPT_TOKENS`.

The token engine makes its batches by this number. It is no promise: a row that needs more by itself is still tried.
Where the device sets the limit, and others use it too, the number depends on what they have left, and so may the size
of a batch; answers do not, but for the rounding that the token engine speaks of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chulengo.model.decode import PLACE_STEP, PROMPT_TOKENS, cache_bytes
from chulengo.model.gpu_limit import give_back_memory, limit_of
from chulengo.model.inference import CACHE_TOKENS
from chulengo.model.plan_memory import CUDA_CONTEXT_BYTES, gib

if TYPE_CHECKING:
    import torch

    from chulengo.model.fast import FastModel
    from chulengo.model.plan_shapes import ModelShape

# cuBLAS on Hopper holds 32 MiB for the stream and as much for the one that graphs are captured on; 32 for what is small
FIRST_USE_BYTES = 96 << 20
LOGIT_BYTES = 48  # of one logit: 16 bits, float32, sorted with their places and the sort's own memory


def tokens_within(room_bytes: int, sizes: ModelShape, dtype: torch.dtype) -> int:
    """Returns how many tokens, the places of all rows together, fit into some memory; 0 where none does.

    Args:
        room_bytes: what is left for them.
        sizes: of the model.
        dtype: of the products.
    """
    held, read = held_bytes(sizes, dtype), read_bytes(sizes, dtype)
    # all of them read at once, or, where they are more, PROMPT_TOKENS at a time
    return max(0, room_bytes // (held + read), (room_bytes - PROMPT_TOKENS * read) // held)


def held_bytes(sizes: ModelShape, dtype: torch.dtype) -> int:
    """Returns what a place takes while answers are made, its part of the row's logits included."""
    one_layer = cache_bytes(sizes, dtype, 1) // sizes.num_layers
    return cache_bytes(sizes, dtype, 1) + one_layer + LOGIT_BYTES * sizes.vocab // PLACE_STEP


def read_bytes(sizes: ModelShape, dtype: torch.dtype) -> int:
    """Returns what a prompt's token takes of a layer's states, where they are most, while it is read."""
    d, q, kv = sizes.hidden, sizes.q_width, sizes.kv_width
    # before attention: two streams, their sum, its norm; q, k, v, perhaps normed; attention's output
    before = 4 * d + 3 * q + 4 * kv
    # after it: two streams and their sum, attention's output, what the map after it gives, their sum and its norm;
    # gate and up, their product, what the last map gives
    after = 7 * d + q + 3 * sizes.intermediate
    return max(before, after) * dtype.itemsize


def limit_cache(model: FastModel, trained_bytes: int | None) -> str | None:
    """Sets the model's `cache_tokens`, on a GPU; returns a line for the user where that is below `CACHE_TOKENS`.

    Args:
        model: loaded, with its adapter.
        trained_bytes: the most that the adapter's training took of the GPU; None: not known, or not to be kept to.
    """
    if model.device.type != "cuda":
        return None
    import torch

    give_back_memory()
    loaded = torch.cuda.memory_allocated(model.device)
    most, whole = loaded + torch.cuda.mem_get_info(model.device)[0], limit_of(model.device)
    if whole is not None:
        most = min(most, whole - CUDA_CONTEXT_BYTES)
    why = "as there is no more room on the GPU"
    if trained_bytes is not None and trained_bytes < most:
        most, why = trained_bytes, f"to take no more memory than the adapter's training ({gib(trained_bytes)})"
    room = most - loaded - model.unwritten_bytes() - FIRST_USE_BYTES
    model.cache_tokens = tokens_within(room, model.shape.sizes, model.dtype)
    if model.cache_tokens >= CACHE_TOKENS:
        return None
    if model.cache_tokens < PLACE_STEP:
        return f"prompts are answered one at a time, {why}"
    said = f"at most {model.cache_tokens:,} tokens of prompts and answers are held at once, {why}"
    return f"{said}: long ones go fewer at a time than was asked for"
