"""NF4 to bfloat16 (or float32, float16, FP8) in one launch, with the double-quantised absmax decoded on the way.

The formulas are in `reference/nf4.py`. What decides the speed: a weight costs 0.52 bytes to read and 2 to write, so at
4.3 TB/s an H200 has about 17 lane-instructions for each. A tree of 15 selects does not fit in that; a gathered load
from the 64-byte table of levels, which stays in L1, does (about 7 instructions in all). The three launches of
bitsandbytes (8-bit map, add the offset, 4-bit) become one, and its two passes over the absmax list vanish.

Each thread reads 16 bytes (32 indices) and writes 16-byte pieces of the row-major [O, I] result. `_flat` serves plain
dequantisation of any shape; `_tile` works on [BLOCK_O, BLOCK_I] tiles, because folding an adapter in is a small matrix
product (B_tile A_tile, accumulated in float32); `_fp8` does because one of its two layouts is transposed.

All launches switch floating-point contraction off: level * nested + offset as one fused multiply-add would differ
from bitsandbytes in the last bit.

Legend: O out features, I in features, R adapter rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chulengo.kernels.applies import need, need_rows
from chulengo.kernels.fused.launch import need_launchable
from chulengo.kernels.limits import LARGEST_RANK, MOST_VALUES, REFERENCE_ENGINE, WORD_VALUES
from chulengo.kernels.reference.nf4 import NESTED_BLOCK_SIZE, NF4Weight, check_row_scale

WORDS = 512  # 32-bit words a program of 4 warps: 16 bytes a thread to read, 64 to write
BLOCK_O, BLOCK_I = 16, 256  # of ten sizes tried on an H200 the fastest, with an adapter and without
FP8, FP8_TRANSPOSED = (16, 256), (64, 128)  # likewise, of fourteen; the transposed copy has rows of BLOCK_O bytes


@triton.jit
def _block_absmax(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, block, inside, NESTED: tl.constexpr,
                  NESTED_BLOCK: tl.constexpr):  # fmt: skip
    """absmax of quantisation block `block`: map[absmax_8bit] * nested_absmax + offset."""
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_ptr + block // NESTED_BLOCK, mask=inside, other=0.0)
        absmax = tl.load(nested_map_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)
    return absmax


@triton.jit
def _flat(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, out_ptr, num_words, num_values,
          QUANT_BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, PER_LOAD: tl.constexpr,
          LOADS: tl.constexpr):  # fmt: skip
    """out[v] = levels[index[v]] * absmax[v // QUANT_BLOCK]; a "word" is 32 bits (PER_LOAD = 8) or a byte (2)."""
    word = tl.program_id(0) * LOADS + tl.arange(0, LOADS)
    first = word * PER_LOAD
    inside = word < num_words
    bits = tl.load(packed_ptr + word, mask=inside, other=0).to(tl.int32)
    absmax = _block_absmax(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, first // QUANT_BLOCK, inside, NESTED,
                           NESTED_BLOCK)  # fmt: skip
    # the first of two indices is in the high half of its byte, bytes count from the low end: shift 4, 0, 12, 8, …
    step = tl.arange(0, PER_LOAD)
    index = (bits[:, None] >> (4 * (step ^ 1))[None, :]) & 15
    value = tl.load(levels_ptr + index) * absmax[:, None]
    place = first[:, None] + step[None, :]
    if PER_LOAD == 8:  # the number of values is a multiple of 8: one mask a word keeps the stores 16 bytes wide
        keep = inside[:, None] & (step >= 0)[None, :]
    else:
        keep = place < num_values
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _values(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, row, num_out, num_in,
            QUANT_BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK_O: tl.constexpr,
            BLOCK_I: tl.constexpr):  # fmt: skip
    """level * absmax of the tile's rows `row` and the columns of program 0's number, float32 [BLOCK_O, BLOCK_I]."""
    WORDS_I: tl.constexpr = BLOCK_I // 8
    word = tl.program_id(0) * WORDS_I + tl.arange(0, WORDS_I)
    inside = (row < num_out)[:, None] & (word * 8 < num_in)[None, :]
    place = row[:, None] * (num_in // 8) + word[None, :]
    bits = tl.load(packed_ptr + place, mask=inside, other=0)
    absmax = _block_absmax(absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, place * 8 // QUANT_BLOCK, inside, NESTED,
                           NESTED_BLOCK)  # fmt: skip
    index = (bits[:, :, None] >> (4 * (tl.arange(0, 8) ^ 1))[None, None, :]) & 15
    value = tl.load(levels_ptr + index) * absmax[:, :, None]
    return tl.reshape(value, (BLOCK_O, BLOCK_I))


@triton.jit
def _tile(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, a_ptr, b_ptr, row_scale_ptr,
          out_ptr, num_out, num_in, lora_scale, stride_a, stride_b, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
          PRECISION: tl.constexpr, SCALED: tl.constexpr, QUANT_BLOCK: tl.constexpr, NESTED: tl.constexpr,
          NESTED_BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    """W + s B A for one tile, its rows scaled where asked for."""
    row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    value = _values(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, row, num_out, num_in,
                    QUANT_BLOCK, NESTED, NESTED_BLOCK, BLOCK_O, BLOCK_I)  # fmt: skip
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_in, column_in = row < num_out, column < num_in
    r = tl.arange(0, RANK_BLOCK)
    b = tl.load(b_ptr + row[:, None] * stride_b + r[None, :], mask=row_in[:, None] & (r < RANK)[None, :], other=0.0)
    a = tl.load(a_ptr + r[:, None] * stride_a + column[None, :], mask=(r < RANK)[:, None] & column_in[None, :],
                other=0.0)  # fmt: skip
    # W + s * (B @ A)
    value += lora_scale * tl.dot(b, a, input_precision=PRECISION)
    if SCALED:
        # (W + s * (B @ A)) * g[:, None]
        value *= tl.load(row_scale_ptr + row, mask=row_in, other=0.0)[:, None]
    keep = row_in[:, None] & column_in[None, :]
    tl.store(out_ptr + row[:, None] * num_in + column[None, :], value.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _fp8(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, scale_ptr, out_ptr, num_out,
         num_in, stride_out, TRANSPOSED: tl.constexpr, QUANT_BLOCK: tl.constexpr, NESTED: tl.constexpr,
         NESTED_BLOCK: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    """(W * (1 / scale)).to(e4m3) for one tile: scaled by row of W, or by column and transposed."""
    row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    value = _values(packed_ptr, absmax_ptr, nested_ptr, nested_map_ptr, offset_ptr, levels_ptr, row, num_out, num_in,
                    QUANT_BLOCK, NESTED, NESTED_BLOCK, BLOCK_O, BLOCK_I)  # fmt: skip
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    row_in, column_in = row < num_out, column < num_in
    keep = row_in[:, None] & column_in[None, :]
    if TRANSPOSED:
        scale = tl.load(scale_ptr + column, mask=column_in, other=1.0)
        inverse = tl.div_rn(tl.full((BLOCK_I,), 1.0, tl.float32), scale)
        value = (value * inverse[None, :]).to(tl.float8e4nv)
        tl.store(out_ptr + column[:, None] * stride_out + row[None, :], tl.trans(value), mask=tl.trans(keep))
    else:
        scale = tl.load(scale_ptr + row, mask=row_in, other=1.0)
        inverse = tl.div_rn(tl.full((BLOCK_O,), 1.0, tl.float32), scale)
        value = (value * inverse[:, None]).to(tl.float8e4nv)
        tl.store(out_ptr + row[:, None] * stride_out + column[None, :], value, mask=keep)


def _tables(weight: NF4Weight) -> tuple[torch.Tensor, ...]:
    """Returns absmax, nested absmax, nested map and offset; unused pointers point at the levels."""
    if weight.nested_absmax is None:
        return weight.absmax, weight.quant_map, weight.quant_map, weight.quant_map
    return weight.absmax, weight.nested_absmax, weight.nested_quant_map, weight.offset


def _constants(weight: NF4Weight) -> dict[str, object]:
    return {
        "QUANT_BLOCK": weight.block_size,
        "NESTED": weight.nested_absmax is not None,
        "NESTED_BLOCK": NESTED_BLOCK_SIZE,
        "enable_fp_fusion": False,
    }


def _need_weight(weight: NF4Weight) -> None:
    need_launchable(weight.packed)
    need(weight.packed.is_contiguous(), "The packed weight is not contiguous.")
    num_values = weight.shape[0] * weight.shape[1]
    need(num_values < MOST_VALUES, f"The weight has {num_values} values.", allowed="fewer than 2**31",
         next_step=REFERENCE_ENGINE)


def dequantize(
    weight: NF4Weight,
    dtype: torch.dtype,
    *,
    lora_a_RI: torch.Tensor | None = None,
    lora_b_OR: torch.Tensor | None = None,
    lora_scale: float = 1.0,
    row_scale_O: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the weight [O, I] in `dtype`, plus `lora_scale * B A` where given. See `reference.nf4.dequantize`."""
    _need_weight(weight)
    need((lora_a_RI is None) == (lora_b_OR is None), "One of lora_a and lora_b is missing.", allowed="both or neither")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    need(
        out.is_contiguous() and tuple(out.shape) == weight.shape and out.dtype == dtype,
        f"`out` is {tuple(out.shape)} {out.dtype} with strides {out.stride()}.",
        allowed=f"contiguous {weight.shape} {dtype}",
    )
    if row_scale_O is not None:
        check_row_scale(row_scale_O, weight, lora_a_RI)
        need(row_scale_O.is_contiguous(), "The scales of rows are not contiguous.")
    if lora_a_RI is not None:
        _launch_tile(weight, lora_a_RI, lora_b_OR, lora_scale, row_scale_O, out)
        return out
    num_values = out.numel()
    per_load = 8 if num_values % 8 == 0 and weight.packed.data_ptr() % 4 == 0 else 2
    packed = weight.packed.view(-1)
    words = packed.view(torch.int32) if per_load == 8 else packed
    grid = (triton.cdiv(words.numel(), WORDS),)
    _flat[grid](words, *_tables(weight), weight.quant_map, out, words.numel(), num_values, PER_LOAD=per_load,
                LOADS=WORDS, num_warps=4, **_constants(weight))  # fmt: skip
    return out


def dequantize_fp8(weight: NF4Weight, scale: torch.Tensor, out: torch.Tensor, *, transposed: bool) -> None:
    """Writes the weight in e4m3, as it is or transposed. See `reference.nf4.dequantize_fp8`."""
    _need_weight(weight)
    num_out, num_in = weight.shape
    _need_words(weight)
    shape = (num_in, num_out) if transposed else (num_out, num_in)
    need(tuple(out.shape) == shape, f"`out` is {tuple(out.shape)}.", allowed=str(shape))
    need_rows("out", out)
    block_o, block_i = FP8_TRANSPOSED if transposed else FP8
    grid = (triton.cdiv(num_in, block_i), triton.cdiv(num_out, block_o))
    _fp8[grid](weight.packed.view(-1).view(torch.int32), *_tables(weight), weight.quant_map, scale, out, num_out,
               num_in, out.stride(0), TRANSPOSED=transposed, BLOCK_O=block_o, BLOCK_I=block_i,
               num_warps=4, **_constants(weight))  # fmt: skip


def _launch_tile(weight, lora_a_RI, lora_b_OR, lora_scale, row_scale_O, out):
    num_out, num_in = weight.shape
    _need_words(weight)
    a, b, rank = lora_a_RI.detach(), lora_b_OR.detach(), lora_a_RI.shape[0]
    _need_adapter(weight, a, b)
    # bfloat16 factors multiply exactly in float32; float32 ones take three passes of the tensor cores
    precision = "tf32x3" if a.dtype == torch.float32 else "ieee"
    grid = (triton.cdiv(num_in, BLOCK_I), triton.cdiv(num_out, BLOCK_O))
    row_scale = weight.quant_map if row_scale_O is None else row_scale_O
    _tile[grid](weight.packed.view(-1).view(torch.int32), *_tables(weight), weight.quant_map, a, b, row_scale, out,
                num_out, num_in, float(lora_scale), a.stride(0), b.stride(0), RANK=rank,
                RANK_BLOCK=max(16, triton.next_power_of_2(rank)), PRECISION=precision, SCALED=row_scale_O is not None,
                BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I, num_warps=4, **_constants(weight))  # fmt: skip


def _need_words(weight: NF4Weight) -> None:
    num_in = weight.shape[1]
    need(num_in % WORD_VALUES == 0, f"A row has {num_in} values.", allowed=f"multiples of {WORD_VALUES}",
         next_step=REFERENCE_ENGINE)
    need(weight.packed.data_ptr() % 4 == 0, "The packed weight does not start at a multiple of 4 bytes.")


def _need_adapter(weight: NF4Weight, a: torch.Tensor, b: torch.Tensor) -> None:
    rank = a.shape[0]
    need(
        a.shape == (rank, weight.shape[1]) and b.shape == (weight.shape[0], rank),
        f"A is {tuple(a.shape)} and B is {tuple(b.shape)} for a weight {weight.shape}.",
        allowed="A [R, I] and B [O, R]",
    )
    need(rank <= LARGEST_RANK, f"The rank is {rank}.", allowed=f"at most {LARGEST_RANK}", next_step=REFERENCE_ENGINE)
    need(a.dtype == b.dtype, f"A is {a.dtype} and B is {b.dtype}.", allowed="one dtype")
    need_rows("A", a)
    need_rows("B", b)

