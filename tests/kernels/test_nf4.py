"""NF4: bit-equal to bitsandbytes, the fused kernels bit-equal to the reference, adapters folded in, FP8 copies."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from measure import errors, faults, mutant, normal
from torch import Tensor

from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import nf4 as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the last rows end in the middle of a quantisation block, of a nested block, of a program's block and of a byte
SHAPES = [(64, 64), (1, 64), (96, 136), (33, 1032), (5, 7), (3, 50), (264, 128)]


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import nf4

    return nf4


def bits(x: Tensor) -> Tensor:
    return x.contiguous().cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def weight(shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    values = normal(*shape, dtype=torch.float32, device=torch.device("cpu"), seed=seed)
    # rows of very different size, so that absmax blocks differ and a shifted absmax is seen
    return (values * torch.linspace(0.2, 3.0, shape[0])[:, None]).to(dtype).to(device)


class TestAgainstBitsandbytes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", [*SHAPES, (130, 640)])
    def test_same_bytes(self, shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        original = weight(shape, dtype, "cuda" if torch.cuda.is_available() else "cpu")
        packed, state = functional.quantize_4bit(original, compress_statistics=double_quant, quant_type="nf4")
        ours = reference.quantize(original, double_quant=double_quant)
        assert torch.equal(ours.packed, packed)
        theirs = state.as_dict(packed=True)
        stored = reference.to_state_dict(ours)
        assert set(stored) - {""} == set(theirs)
        for key, value in theirs.items():
            assert torch.equal(stored[key].cpu(), value.cpu()), key
        with torch.compiler.set_stance("force_eager"):  # theirs compiles for odd shapes: half a minute
            restored = functional.dequantize_4bit(packed, state)
        assert torch.equal(bits(reference.dequantize(ours, dtype)), bits(restored))

    @pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
    def test_other_block_sizes(self, block_size: int) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        original = weight((40, 520), torch.bfloat16)
        packed, state = functional.quantize_4bit(original, blocksize=block_size, quant_type="nf4")
        ours = reference.quantize(original, block_size=block_size, double_quant=False)
        assert torch.equal(ours.packed, packed)
        assert torch.equal(ours.absmax, state.absmax)

    def test_zero_blocks_and_ties(self) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        original = torch.zeros(4, 128)
        levels = reference.nf4_levels()
        original[1, :16], original[2, :15] = levels, (levels[1:] + levels[:-1]) / 2
        original[2, 20] = 1.0
        packed, state = functional.quantize_4bit(original, compress_statistics=True, quant_type="nf4")
        ours = reference.quantize(original)
        assert torch.equal(ours.packed, packed)
        assert torch.equal(ours.absmax, state.absmax)

    def test_reads_what_bitsandbytes_wrote(self) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        original = weight((64, 192), torch.bfloat16)
        layer = bitsandbytes.nn.Linear4bit(192, 64, bias=False, quant_type="nf4", compress_statistics=True)
        layer.weight = bitsandbytes.nn.Params4bit(original, requires_grad=False, quant_type="nf4")
        layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
        saved = {key.removeprefix("weight").removeprefix("."): value for key, value in layer.state_dict().items()}
        ours = reference.from_state_dict(saved)
        theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(bits(reference.dequantize(ours, torch.bfloat16)), bits(theirs))
        again = reference.to_state_dict(ours)
        assert all(torch.equal(again[key].cpu(), saved[key].cpu()) for key in saved)

    def test_the_map_of_nested_absmax(self) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        assert torch.equal(reference.dynamic_map(), functional.create_dynamic_map())

    def test_a_table_that_is_not_nf4_is_refused(self) -> None:
        stored = reference.to_state_dict(reference.quantize(weight((8, 64), torch.float32)))
        stored["quant_map"] = stored["quant_map"].flip(0)
        with pytest.raises(KernelError, match="not NF4"):
            reference.from_state_dict(stored)


class TestFusedIsTheReference:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_bit_equal(self, shape, double_quant, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
        quantised = reference.quantize(weight(shape, torch.bfloat16, device), double_quant=double_quant)
        assert torch.equal(bits(fused.dequantize(quantised, dtype)), bits(reference.dequantize(quantised, dtype)))

    def test_writes_into_a_buffer(self, device, fused) -> None:  # type: ignore[no-untyped-def]
        quantised = reference.quantize(weight((64, 96), torch.bfloat16, device))
        out = torch.full((64, 96), float("nan"), dtype=torch.bfloat16, device=device)
        assert fused.dequantize(quantised, torch.bfloat16, out=out) is out
        assert torch.equal(bits(out), bits(reference.dequantize(quantised, torch.bfloat16)))
        with pytest.raises(KernelError, match="`out` is"):
            fused.dequantize(quantised, torch.float32, out=out)

    @pytest.mark.parametrize(
        "edit",
        [
            pytest.param(("first // QUANT_BLOCK, inside", "first // QUANT_BLOCK + 1, inside"), id="absmax of the next"),
            pytest.param(("(4 * (step ^ 1))", "(4 * step)"), id="low half of a byte first"),
            pytest.param((" + tl.load(offset_ptr)", ""), id="offset forgotten"),
            pytest.param(("block // NESTED_BLOCK", "block * 0"), id="first nested absmax for all"),
        ],
    )
    def test_named_wrong_kernels_fail(self, edit, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        quantised = reference.quantize(weight((264, 128), torch.bfloat16, device))
        wrong = mutant(fused, [edit], tmp_path).dequantize(quantised, torch.bfloat16)
        assert not torch.equal(bits(wrong), bits(reference.dequantize(quantised, torch.bfloat16)))

    @pytest.mark.gpu
    @pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (1000, 4104)])
    def test_large(self, shape: tuple[int, int]) -> None:
        fused = pytest.importorskip("chulengo.kernels.fused.nf4")
        quantised = reference.quantize(weight(shape, torch.bfloat16, "cuda"))
        for dtype in DTYPES:
            assert torch.equal(bits(fused.dequantize(quantised, dtype)), bits(reference.dequantize(quantised, dtype)))


def adapter(shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a = normal(rank, shape[1], dtype=dtype, device=device, seed=1, scale=rank**-0.5)
    return a, normal(shape[0], rank, dtype=dtype, device=device, seed=2)


def fold_faults(module: ModuleType, shape, rank: int, factor_dtype, dtype, device, scale=None) -> list[str]:  # type: ignore[no-untyped-def]
    quantised = reference.quantize(weight(shape, torch.bfloat16, device))
    a, b = adapter(shape, rank, factor_dtype, device)
    got = module.dequantize(quantised, dtype, lora_a_RI=a, lora_b_OR=b, lora_scale=0.5, row_scale_O=scale)
    base = reference.dequantize(quantised, torch.float32)
    exact = base.double() + 0.5 * (b.double() @ a.double())
    # plain: one product in the factors' dtype, one sum in the result's
    plain = reference.dequantize(quantised, dtype) + (0.5 * (b @ a)).to(dtype)
    if scale is not None:
        exact, plain = exact * scale[:, None], plain * scale[:, None].to(dtype)
    return faults({"weight": got}, {"weight": exact}, {"weight": plain})


class TestFold:
    @pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("shape", "rank"), [((64, 128), 16), ((37, 136), 8), ((40, 264), 64), ((8, 8), 3)])
    def test_near_exact(self, shape, rank, factor_dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
        for module in (reference, fused):
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.float32 and factor_dtype != dtype:
                    continue
                assert not fold_faults(module, shape, rank, factor_dtype, dtype, device)

    @pytest.mark.parametrize(
        "edit",
        [
            pytest.param(("lora_scale * tl.dot", "tl.dot"), id="scale missing"),
            pytest.param(("place * 8 // QUANT_BLOCK", "place * 8 // QUANT_BLOCK + 1"), id="absmax of the next block"),
            pytest.param(("mask=(r < RANK)[:, None] &", "mask=(r < RANK - 1)[:, None] &"), id="last rank dropped"),
        ],
    )
    def test_named_wrong_kernels_fail(self, edit, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        assert fold_faults(mutant(fused, [edit], tmp_path), (64, 128), 16, torch.bfloat16, torch.bfloat16, device)

    def test_scaled_rows(self, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        scale = normal(37, dtype=torch.float32, device=device, seed=3)
        for dtype in (torch.float32, torch.bfloat16):
            for module in (reference, fused):
                assert not fold_faults(module, (37, 136), 8, dtype, dtype, device, scale)
        wrong = mutant(fused, [("(row_scale_ptr + row,", "(row_scale_ptr + row // 2,")], tmp_path)
        assert fold_faults(wrong, (37, 136), 8, torch.bfloat16, torch.bfloat16, device, scale)

    def test_what_does_not_apply_is_named(self, device, fused) -> None:  # type: ignore[no-untyped-def]
        quantised = reference.quantize(weight((8, 12), torch.bfloat16, device))
        a, b = adapter((8, 12), 4, torch.bfloat16, device)
        with pytest.raises(KernelError, match="multiples of 8") as caught:
            fused.dequantize(quantised, torch.bfloat16, lora_a_RI=a, lora_b_OR=b)
        assert caught.value.next_step == "--set model.engine=reference"
        whole = reference.quantize(weight((8, 16), torch.bfloat16, device))
        for rank in (128, 129):
            a_RI, b_OR = adapter((8, 16), rank, torch.bfloat16, device)
            if rank == 129:
                with pytest.raises(KernelError, match="rank is 129") as caught:
                    fused.dequantize(whole, torch.bfloat16, lora_a_RI=a_RI, lora_b_OR=b_OR)
                assert caught.value.next_step == "--set model.engine=reference"
            else:
                fused.dequantize(whole, torch.bfloat16, lora_a_RI=a_RI, lora_b_OR=b_OR)
        with pytest.raises(KernelError, match="missing"):
            fused.dequantize(quantised, torch.bfloat16, lora_a_RI=a)
        for module in (reference, fused):
            with pytest.raises(KernelError, match="no adapter"):
                module.dequantize(quantised, torch.bfloat16, row_scale_O=torch.ones(8, device=device))
            with pytest.raises(KernelError, match="scales of rows are"):
                module.dequantize(quantised, torch.bfloat16, lora_a_RI=a, lora_b_OR=b,
                                  row_scale_O=torch.ones(12, device=device))  # fmt: skip

    @pytest.mark.gpu
    @pytest.mark.parametrize("rank", [16, 64])
    @pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)])
    def test_large(self, shape: tuple[int, int], rank: int) -> None:
        fused = pytest.importorskip("chulengo.kernels.fused.nf4")
        for dtype in (torch.float32, torch.bfloat16):
            assert not fold_faults(fused, shape, rank, dtype, dtype, torch.device("cuda"))


def fp8_copy(module: ModuleType, shape, device, transposed: bool):  # type: ignore[no-untyped-def]
    """A copy with room behind its rows, its scale, and the exact weight in the same orientation."""
    quantised = reference.quantize(weight(shape, torch.bfloat16, device))
    scale = reference.fp8_scales(quantised)[transposed]
    exact = reference.dequantize(quantised, torch.float32)
    exact = exact.t() if transposed else exact
    wider = torch.full((exact.shape[0], exact.shape[1] + 128), 3.0, device=device).to(torch.float8_e4m3fn)
    module.dequantize_fp8(quantised, scale, wider[:, : exact.shape[1]], transposed=transposed)
    assert (wider[:, exact.shape[1] :].float() == 3).all(), "written beyond the row"
    return wider[:, : exact.shape[1]], scale, exact


@pytest.mark.parametrize("transposed", [False, True])
class TestFP8:
    @pytest.mark.parametrize("shape", [(64, 128), (37, 136), (130, 264)])
    def test_fused_is_the_reference(self, shape, transposed, device, fused) -> None:  # type: ignore[no-untyped-def]
        want, scale, exact = fp8_copy(reference, shape, device, transposed)
        got, _, _ = fp8_copy(fused, shape, device, transposed)
        assert torch.equal(bits(got.contiguous()), bits(want.contiguous()))
        # e4m3 keeps four bits: at most 2**-4 of a value, on average about 2.5 % in rms
        assert errors(got.float() * scale, exact)[0] < 0.03

    def test_scales_use_the_range(self, transposed, device) -> None:  # type: ignore[no-untyped-def]
        copy, scale, exact = fp8_copy(reference, (64, 128), device, transposed)
        amax, average = exact.abs().amax(1), exact.abs().amax(1).mean()
        usual = amax > average / 4
        assert usual.float().mean() > 0.9
        assert (copy[usual].float().abs().amax(1) == reference.LARGEST_IN_COPY).all()
        torch.testing.assert_close(amax.clamp(min=average / 4)[:, None] / reference.LARGEST_IN_COPY, scale)

    @pytest.mark.parametrize(
        "edit",
        [
            pytest.param(("value * inverse[None, :]", "value"), id="no scale, transposed"),
            pytest.param(("value * inverse[:, None]", "value * inverse[:, None] * 0.5"), id="half the scale"),
        ],
    )
    def test_wrong_kernels_fail(self, edit, transposed, device, fused, tmp_path) -> None:  # type: ignore[no-untyped-def]
        wrong = mutant(fused, [edit], tmp_path)
        shares = []
        for side in (transposed, not transposed):
            want, _, _ = fp8_copy(reference, (64, 128), device, side)
            got, _, _ = fp8_copy(wrong, (64, 128), device, side)
            shares.append((bits(got.contiguous()) != bits(want.contiguous())).float().mean())
        assert max(shares) > 0.5

    @pytest.mark.gpu
    @pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)])
    def test_large(self, shape, transposed) -> None:  # type: ignore[no-untyped-def]
        fused = pytest.importorskip("chulengo.kernels.fused.nf4")
        want, _, _ = fp8_copy(reference, shape, torch.device("cuda"), transposed)
        got, _, _ = fp8_copy(fused, shape, torch.device("cuda"), transposed)
        assert torch.equal(bits(got.contiguous()), bits(want.contiguous()))
