"""NF4 weights as bitsandbytes stores them: quantise, dequantise, fold an adapter in, FP8 copies.

The format (QLoRA, https://arxiv.org/abs/2305.14314, section 3). A weight is read row by row as one flat list. Each
block of 64 values w is divided by its largest magnitude, a = max |w| ("absmax"), and every value becomes the index c
of the nearest of 16 levels, the quantiles of a normal distribution:

    c = argmin_i |level_i - w / a|          w' = level_c * a                                        (eq. 5 inverted)

Two indices share a byte, the first in the high four bits. Double quantisation stores the absmax list itself in 8 bits:
its mean ("offset") is taken off, and blocks of 256 differences are quantised to a 256-level map, so

    a = map_k * nested_absmax + offset                                                                 (eq. 6)

which costs 4 + 8/64 + 32/(64*256) = 4.127 bits a weight instead of 4.5.

Bit-equal to bitsandbytes 0.50, whose CPU and CUDA code differ in three details; we follow the device of the tensor:
- CPU finds the 8-bit level through a table of 65,536 cells, so 0.15 % of values land beside the nearest level; CUDA
  compares with the midpoints, and a value on a midpoint goes to the level with the even index;
- a block of zeros gets the level 0 (index 7) on CPU, and index 0 (level -1, times absmax 0) on CUDA;
- a last block that is not full is divided by its absmax on CPU, multiplied by 1/absmax on CUDA.

Products and the sum are rounded separately (no fused multiply-add), as there.

Legend: O out features, I in features, R adapter rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chulengo.kernels.applies import need

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
E4M3_LARGEST = 448.0
LARGEST_IN_COPY = 56.0
LEAST_OF_AVERAGE = 0.25
CELLS = 65535  # bitsandbytes' CPU table: cell i stands for the value 2 i / 65535 - 1
QUANT_STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A quantised weight [O, I]; the tensors are those of bitsandbytes' state dict.

    Attributes:
        packed: uint8 [ceil(O*I/2), 1]; two indices a byte, the first in the high bits.
        absmax: float32 [blocks], or uint8 [blocks] where `nested_absmax` is given.
        quant_map: float32 [16], the NF4 levels.
        shape: (O, I).
        block_size: values that share an absmax.
        dtype: dtype of the weight that was quantised.
        nested_absmax: float32 [ceil(blocks/256)] or None without double quantisation.
        nested_quant_map: float32 [256] or None.
        offset: float32 [] or None; the mean of the absmax list.
    """

    packed: Tensor
    absmax: Tensor
    quant_map: Tensor
    shape: tuple[int, int]
    block_size: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_quant_map: Tensor | None = None
    offset: Tensor | None = None

    @property
    def double_quant(self) -> bool:
        """Whether the absmax list is itself quantised."""
        return self.nested_absmax is not None

    def is_finite(self) -> Tensor:
        """Returns whether every value that was quantised was finite, bool [] on the device; the host does not wait.

        The largest magnitude of a block with NaN or infinity in it is that, and so is what is made of all blocks' ones.
        """
        if self.nested_absmax is None or self.offset is None:
            return self.absmax.isfinite().all()
        return self.offset.isfinite() & self.nested_absmax.isfinite().all()

    def num_bytes(self) -> int:
        """Returns the bytes of all its tensors."""
        tensors = (self.packed, self.absmax, self.quant_map, self.nested_absmax, self.nested_quant_map, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> NF4Weight:
        """Returns the same weight with its tensors on `device`."""
        return self.placed(lambda tensor: tensor.to(device))

    def placed(self, place: Callable[[Tensor], Tensor]) -> NF4Weight:
        """Returns the same weight with every tensor as `place` returns it: elsewhere, with the same values."""
        nested = (self.nested_absmax, self.nested_quant_map, self.offset)
        return NF4Weight(
            place(self.packed), place(self.absmax), place(self.quant_map), self.shape, self.block_size, self.dtype,
            *(None if tensor is None else place(tensor) for tensor in nested),
        )


def nf4_levels(device: torch.device | str = "cpu") -> Tensor:
    """Returns the 16 NF4 levels, float32 [16], ascending."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """Returns the signed 8-bit dynamic map, float32 [256], ascending (https://arxiv.org/abs/1511.04561, section 2).

    Decade i of seven, from 1e-6 to 1, is cut into 2**i equal steps whose centres are levels, with both signs; 0 and 1
    complete the 256.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        # the product is taken in float32, the power of ten in float64, as there
        centres = (10 ** (-6 + i)) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


def _blocks(values: Tensor, size: int) -> Tensor:
    """Returns `values` [n] as [ceil(n/size), size], the last block filled up with zeros."""
    padding = -values.numel() % size
    return torch.nn.functional.pad(values, (0, padding)).view(-1, size)


def _nearest_8bit(scaled: Tensor, levels: Tensor) -> Tensor:
    """Returns the index of the level that bitsandbytes picks on the device of `scaled`, int64."""
    midpoints = (levels[:-1] + levels[1:]) * 0.5
    if scaled.device.type == "cpu":
        # float64 holds the product exactly, so there is one rounding, as in their fused multiply-add
        cell = ((scaled.clamp(-1, 1) + 1) * 0.5).double().mul(CELLS).add(0.5).float().to(torch.int64)
        centres = torch.arange(CELLS + 1, dtype=torch.float32) * 2.0 / CELLS - 1.0
        return torch.bucketize(centres, midpoints)[cell.clamp(0, CELLS)]  # NaN is no index; absmax still tells of it
    lower = torch.bucketize(scaled, midpoints)
    tie_goes_up = (scaled == midpoints[lower.clamp(max=254)]) & (lower % 2 == 1)
    return torch.where(tie_goes_up, lower + 1, lower)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns uint8 indices [blocks], nested absmax, the map and the offset of an absmax list [blocks]."""
    levels = dynamic_map(absmax.device)
    offset = absmax.mean()
    blocks = _blocks(absmax - offset, NESTED_BLOCK_SIZE)
    nested = blocks.abs().amax(1)
    empty = nested[:, None] == 0  # a list of one value, or of equal ones: index 0 on both devices
    index = _nearest_8bit((blocks * (1.0 / nested)[:, None]).masked_fill(empty, 0.0), levels).masked_fill(empty, 0)
    return index.to(torch.uint8).view(-1)[: absmax.numel()], nested, levels, offset


def quantize(weight_OI: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Returns `weight_OI` in NF4, bit-equal to `bitsandbytes.functional.quantize_4bit` on the same device.

    Args:
        weight_OI: [O, I], float32, bfloat16 or float16.
        block_size: values that share an absmax.
        double_quant: store the absmax list in 8 bits.
    """
    need(block_size in BLOCK_SIZES, f"block_size is {block_size}.", allowed=", ".join(map(str, BLOCK_SIZES)))
    need(weight_OI.dim() == 2, f"The weight has shape {tuple(weight_OI.shape)}.", allowed="two dimensions")
    levels = nf4_levels(weight_OI.device)
    values = weight_OI.detach().reshape(-1).float()
    blocks = _blocks(values, block_size)
    absmax = blocks.abs().amax(1)
    on_cpu = values.device.type == "cpu"
    scaled = blocks * (1.0 / (absmax.clamp(min=1e-38) if on_cpu else absmax))[:, None]
    if on_cpu and (rest := values.numel() % block_size):
        absmax[-1] = absmax[-1].clamp(min=1e-38)
        scaled[-1, :rest] = blocks[-1, :rest] / absmax[-1]
    # w / a above the midpoint of two levels takes the upper one
    index = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    if not on_cpu:
        index = torch.where(absmax[:, None] == 0, 0, index).to(torch.uint8)
    index = index.view(-1)[: values.numel() + values.numel() % 2]
    if values.numel() % 2:  # the half byte without a value holds level 0
        index[-1] = 7
    packed = ((index[::2] << 4) | index[1::2])[:, None]
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, levels, shape, block_size, weight_OI.dtype)
    absmax_8bit, nested, nested_levels, offset = _quantize_absmax(absmax)
    return NF4Weight(
        packed, absmax_8bit, levels, shape, block_size, weight_OI.dtype, nested, nested_levels, offset
    )  # fmt: skip


def dequantize_absmax(weight: NF4Weight) -> Tensor:
    """Returns the absmax list, float32 [blocks]."""
    if weight.nested_absmax is None or weight.nested_quant_map is None or weight.offset is None:
        return weight.absmax
    levels = weight.nested_quant_map[weight.absmax.to(torch.int64)]
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: levels.numel()]
    return levels * nested + weight.offset  # eq. 6


def dequantize(
    weight: NF4Weight,
    dtype: torch.dtype,
    *,
    lora_a_RI: Tensor | None = None,
    lora_b_OR: Tensor | None = None,
    lora_scale: float = 1.0,
    row_scale_O: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the weight [O, I] in `dtype`, with `lora_scale * B A` added where an adapter is given.

    Without an adapter it is bit-equal to `bitsandbytes.functional.dequantize_4bit`. With one, the sum is formed in
    float32 and rounded once, so that x W' is one product instead of x W + s (x Aᵀ) Bᵀ.

    Args:
        weight: the quantised weight.
        dtype: float32, bfloat16 or float16.
        lora_a_RI: [R, I] or None.
        lora_b_OR: [O, R]; given exactly when `lora_a_RI` is.
        lora_scale: alpha / rank, or alpha / sqrt(rank).
        row_scale_O: float32, of the rows of the sum; only with an adapter.
        out: a contiguous [O, I] tensor of `dtype` to write into.
    """
    value_OI = _values(weight, lora_a_RI, lora_b_OR, lora_scale)
    if row_scale_O is not None:
        check_row_scale(row_scale_O, weight, lora_a_RI)
        value_OI = value_OI * row_scale_O[:, None]
    value_OI = value_OI.to(dtype)
    if out is None:
        return value_OI
    out.copy_(value_OI)
    return out


def check_row_scale(row_scale_O: Tensor, weight: NF4Weight, lora_a_RI: Tensor | None) -> None:
    """Raises `KernelError` unless the scales are float32 [O] and there is an adapter."""
    need(
        row_scale_O.shape == (weight.shape[0],) and row_scale_O.dtype == torch.float32,
        f"The scales of rows are {tuple(row_scale_O.shape)} {row_scale_O.dtype} for a weight {weight.shape}.",
        allowed=f"float32 [{weight.shape[0]}]",
    )
    need(lora_a_RI is not None, "Rows are scaled, but there is no adapter.", allowed="scales of W + s B A")


def _values(weight: NF4Weight, lora_a_RI: Tensor | None, lora_b_OR: Tensor | None, lora_scale: float) -> Tensor:
    """Returns level * absmax + scale * B A in float32 [O, I]."""
    num_values = weight.shape[0] * weight.shape[1]
    packed = weight.packed.view(-1)
    index = torch.stack((packed >> 4, packed & 15), 1).view(-1)[:num_values]
    absmax = dequantize_absmax(weight).repeat_interleave(weight.block_size)[:num_values]
    value_OI = (weight.quant_map[index.to(torch.int64)] * absmax).view(weight.shape)
    need((lora_a_RI is None) == (lora_b_OR is None), "One of lora_a and lora_b is missing.", allowed="both or neither")
    if lora_a_RI is not None and lora_b_OR is not None:
        value_OI = value_OI + lora_scale * (lora_b_OR.detach().float() @ lora_a_RI.detach().float())
    return value_OI


def fp8_scales(weight: NF4Weight) -> tuple[Tensor, Tensor]:
    """Returns the scales of e4m3 copies: of each row, float32 [O, 1], and of each column, float32 [I, 1].

    Made once for a weight.
    """
    return matrix_scales(_values(weight, None, None, 1.0))


def matrix_scales(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales of a matrix that is not quantised, as `fp8_scales` does.

    Each row's largest value becomes 56, not 448. The three powers of two above it are for the columns of an adapter,
    which share the scale of the row they stand in (`reference.fp8.copy_adapter`). It costs nothing: e4m3 is a floating
    format of 15 powers of two, and NF4's smallest level is 2**-4 of its block's largest. For the same reason no scale
    is below a quarter of the average: a row of zeros, or one much smaller than the others, would otherwise leave an
    adapter's column, whose factor is the same for all rows, no room in any of them.
    """
    magnitude_OI, smallest = weight_OI.float().abs(), 1e-12
    amaxes = magnitude_OI.amax(1), magnitude_OI.amax(0)
    row_O1, column_I1 = (
        (torch.maximum(amax, amax.mean() * LEAST_OF_AVERAGE).clamp(min=smallest) / LARGEST_IN_COPY)[:, None]
        for amax in amaxes
    )
    return row_O1, column_I1


def dequantize_fp8(weight: NF4Weight, scale: Tensor, out: Tensor, *, transposed: bool) -> None:
    """Writes W in float8_e4m3fn, rounded once from float32: as [O, I] scaled by row, or as [I, O] by column of W.

    The first serves y = x Wᵀ, the second dx = dy W: `torch._scaled_mm` wants both operands contiguous along the
    summed dimension, and a scale for each row of either.

    Args:
        weight: the quantised weight.
        scale: float32 [O, 1], or [I, 1] when transposed, as `fp8_scales` gives them or larger.
        out: e4m3, with a contiguous last dimension; rows may lie further apart than they are long.
        transposed: which of the two.
    """
    value_OI = _values(weight, None, None, 1.0)
    value = value_OI.t() if transposed else value_OI
    out.copy_((value * (1.0 / scale)).to(torch.float8_e4m3fn))


def to_state_dict(weight: NF4Weight) -> dict[str, Tensor]:
    """Returns bitsandbytes' on-disk tensors by suffix: "" for the packed weight, "absmax", "quant_map", …"""
    facts = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"": weight.packed, "absmax": weight.absmax, "quant_map": weight.quant_map}
    if weight.nested_absmax is not None and weight.nested_quant_map is not None and weight.offset is not None:
        tensors |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": weight.nested_quant_map}
        facts |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
    tensors[QUANT_STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Returns the weight held by bitsandbytes' on-disk tensors, keyed as `to_state_dict` keys them.

    Raises:
        KernelError: not NF4, not two-dimensional, or a table that is not the standard one.
    """
    need(QUANT_STATE in tensors, f"There is no '{QUANT_STATE}'.", allowed="bitsandbytes 4-bit weights of type nf4")
    facts = json.loads(bytes(tensors[QUANT_STATE].cpu().tolist()))
    need(facts["quant_type"] == "nf4", f"The quantisation is {facts['quant_type']}.", allowed="nf4")
    need(len(facts["shape"]) == 2, f"The weight has shape {facts['shape']}.", allowed="two dimensions")
    packed = tensors[""].view(torch.uint8).reshape(-1, 1)
    device = packed.device
    standard = torch.equal(tensors["quant_map"].cpu(), nf4_levels())
    need(standard, "The 4-bit table is not NF4's.", allowed="the levels of QLoRA's appendix E")
    shape = (int(facts["shape"][0]), int(facts["shape"][1]))
    dtype = getattr(torch, facts["dtype"])
    common = (packed, tensors["absmax"], tensors["quant_map"], shape, int(facts["blocksize"]), dtype)
    if "nested_absmax" not in tensors:
        return NF4Weight(*common)
    given = f"The absmax list is quantised in blocks of {facts['nested_blocksize']}."
    need(facts["nested_blocksize"] == NESTED_BLOCK_SIZE, given, allowed=str(NESTED_BLOCK_SIZE))
    offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32, device=device)
    return NF4Weight(*common, tensors["nested_absmax"], tensors["nested_quant_map"], offset)
