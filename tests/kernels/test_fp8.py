"""Rows in e4m3: the fused kernels give the reference's bytes, the round trip is as near as e4m3 allows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from measure import errors, mutant, normal
from torch import Tensor

from chulengo.kernels.columns import num_columns
from chulengo.kernels.reference import fp8 as reference
from chulengo.kernels.reference import rms_norm, rope, swiglu
from chulengo.kernels.reference.nf4 import matrix_scales
from chulengo.model.fp8_products import column_table

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 64), (1, 1), (3, 100), (2, 1030)]
EPS = 1e-5


@pytest.fixture
def fused() -> ModuleType:
    pytest.importorskip("triton")
    from chulengo.kernels.fused import fp8

    return fp8


@pytest.fixture
def fused_adapter(fused: ModuleType) -> ModuleType:
    from chulengo.kernels.fused import fp8_adapter

    return fp8_adapter


def rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Rows of very different size, one of them zero, inside a wider tensor."""
    values = normal(shape[0], shape[1] + 8, dtype=torch.float32, device=device, seed=seed)
    values *= torch.logspace(-3, 3, shape[0], device=device)[:, None] if shape[0] > 1 else 1.0
    if shape[0] > 2:
        values[1] = 0
    return values.to(dtype)[:, : shape[1]]


def different(got: Tensor, want: Tensor) -> float:
    return (got.view(torch.uint8) != want.view(torch.uint8)).float().mean().item()


def backward_rows(module: ModuleType, gate: Tensor, up: Tensor, *, again: bool) -> tuple[Tensor, ...]:
    """Rows, scales, and what the kernel wrote on the way."""
    dproduct = normal(*gate.shape, dtype=gate.dtype, device=gate.device, seed=4)
    both = torch.empty((len(gate), 2 * gate.shape[1]), dtype=gate.dtype, device=gate.device)
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if again else None
    made = module.swiglu_backward_rows(dproduct, gate, up, both, product)
    return (*made, both, product) if product is not None else (*made, both)


def backward_in_place(module: ModuleType, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The gradients written over gate and up, which lie in one tensor."""
    dproduct = normal(*gate.shape, dtype=gate.dtype, device=gate.device, seed=4)
    both, product = torch.cat([gate, up], dim=1), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    made = module.swiglu_backward_rows(dproduct, *both.chunk(2, dim=1), both, product)
    return (*made, both, product)


def turned_back(module: ModuleType, x: Tensor) -> tuple[Tensor, ...]:
    """Rows, scales and gradients of three query heads and two key heads of 32 features; one token is all zeros."""
    positions = torch.arange(len(x), device=x.device) % 3
    cos, sin = rope.tables(8, 32, device=x.device)
    heads = normal(len(x), 7, 32, dtype=torch.float32, device=x.device, seed=5) * x.float().norm(dim=1)[:, None, None]
    dq, dk, dv = torch.split(heads.to(x.dtype), [3, 2, 2], dim=1)
    made: tuple[Tensor, ...] = module.rope_backward_rows(dq, dk, dv, cos, sin, positions, 128)
    return (made[0][:, : 7 * 32].contiguous(), *made[1:])


def rows_of_norm(module: ModuleType, x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
    made = module.rms_norm_rows(x, residual, weight, EPS, keep=False)
    assert made[2] is None
    return [part for part in made if part is not None]


def rows_of_norm_backward(
    module: ModuleType, x: Tensor, dsum: Tensor | None, weight: Tensor, scales: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    dy = normal(*x.shape, dtype=x.dtype, device=x.device, seed=6)
    _, _, rstd = rms_norm.forward(x, None, weight, EPS)
    made: tuple[Tensor, ...] = module.rms_norm_backward_rows(dy, dsum, x, weight, rstd, 128, scales=scales)
    return (made[0][:, : x.shape[1]].contiguous(), *made[1:])


def scales_for(x: Tensor) -> tuple[Tensor, Tensor]:
    row, column = (normal(size, 1, dtype=torch.float32, device=x.device, seed=7 + size).abs() for size in x.shape)
    return row, column


def faults(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[str]:
    x, residual = rows(shape, dtype, device, 1), rows(shape, dtype, device, 2)
    weight = normal(shape[1], dtype=dtype, device=device, seed=3)
    pairs = {
        "plain": (module.quantize_rows(x), reference.quantize_rows(x)),
        "norm": (module.rms_norm_rows(x, residual, weight, EPS), reference.rms_norm_rows(x, residual, weight, EPS)),
        "norm alone": (module.rms_norm_rows(x, None, weight, EPS), reference.rms_norm_rows(x, None, weight, EPS)),
        "swiglu": (module.swiglu_rows(x, residual), reference.swiglu_rows(x, residual)),
        "swiglu, not kept": tuple(each.swiglu_rows(x, residual, keep=False)[:2] for each in (module, reference)),
        "norm, not kept": tuple(rows_of_norm(each, x, residual, weight) for each in (module, reference)),
        "norm backward": tuple(rows_of_norm_backward(each, x, residual, weight) for each in (module, reference)),
        "norm backward alone": tuple(rows_of_norm_backward(each, x, None, weight) for each in (module, reference)),
        "norm backward, scaled": tuple(
            rows_of_norm_backward(each, x, residual, weight, scales_for(x)) for each in (module, reference)
        ),
        "rope backward": tuple(turned_back(each, x) for each in (module, reference)),
        "swiglu in place": (backward_in_place(module, x, residual), backward_rows(reference, x, residual, again=True)),
        "swiglu backward": tuple(backward_rows(each, x, residual, again=True) for each in (module, reference)),
        "swiglu backward alone": tuple(backward_rows(each, x, residual, again=False) for each in (module, reference)),
    }
    found = []
    for name, (got, want) in pairs.items():
        # exp and rsqrt differ in the last bit between libraries, so a value may cross a rounding edge, no more
        share = different(got[0], want[0])
        if share > (0 if name == "plain" else 0.01):
            found.append(f"{name}: {share:.2%} of the bytes differ")
        found += [
            f"{name}: part {i} is off by {errors(g, w)[0]:.1e}"
            for i, (g, w) in enumerate(zip(got[1:], want[1:], strict=True))
            if not errors(g, w)[0] < (1e-6 if dtype == torch.float32 else 4e-3)
        ]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_reference(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    assert not faults(fused, shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: torch.dtype) -> None:
    x = rows((5, 512), dtype, torch.device("cpu"), 1)
    rows8, scale = reference.quantize_rows(x)
    assert rows8.float().abs().amax(1)[[0, 2, 3, 4]].eq(448).all(), "the largest value does not use the range"
    for row, back in zip(x, rows8.float() * scale, strict=True):
        assert errors(back, row)[0] < 0.03
    assert not rows8[1].float().any(), "a row of zeros"


def test_fusing_changes_nothing() -> None:
    x, residual = (rows((4, 96), torch.bfloat16, torch.device("cpu"), seed) for seed in (1, 2))
    weight = torch.ones(96, dtype=torch.bfloat16)
    y, _, _ = rms_norm.forward(x, residual, weight, EPS)
    pairs = [
        (reference.rms_norm_rows(x, residual, weight, EPS)[:2], reference.quantize_rows(y)),
        (reference.swiglu_rows(x, residual)[:2], reference.quantize_rows(swiglu.forward(x, residual))),
    ]
    for got, want in pairs:
        assert different(got[0], want[0]) == 0
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((8192, 4096), marks=pytest.mark.gpu)])
def test_fusing_the_norms_backward_changes_no_bit(shape, dtype, device, fused) -> None:  # type: ignore[no-untyped-def]
    from chulengo.kernels.fused import rms_norm as fused_norm

    x, dsum, dy = (rows(shape, dtype, device, seed) for seed in (1, 2, 3))
    weight = normal(shape[1], dtype=dtype, device=device, seed=4)
    _, _, rstd = rms_norm.forward(x, None, weight, EPS)
    for module, norm in ((reference, rms_norm), (fused, fused_norm)):
        for above in (dsum, None):
            dx, _ = norm.backward(dy, above, x, weight, rstd)
            rows8, scale, made = module.rms_norm_backward_rows(dy, above, x, weight, rstd, 128)
            assert torch.equal(made, dx)
            want, want_scale = module.quantize_rows(dx)
            assert different(rows8[:, : shape[1]].contiguous(), want) == 0
            assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_product_without_its_scales_is_read_with_them(device: str, fused: ModuleType) -> None:
    x8, x_scale = reference.quantize_rows(rows((64, 256), torch.bfloat16, torch.device(device), 1))
    w8, w_scale = reference.quantize_rows(normal(96, 256, dtype=torch.bfloat16, device=torch.device(device), seed=2))
    want = reference.product(x8, x_scale, w8, w_scale, torch.float32)
    for module in (reference, fused):
        made = module.unscaled_product(x8, w8, torch.bfloat16)
        assert made.dtype == torch.bfloat16
        assert errors(made.float() * x_scale * w_scale.view(1, -1), want)[0] < 4e-3
    h, weight = (normal(*size, dtype=torch.bfloat16, device=torch.device(device), seed=3) for size in ((64, 96), (96,)))
    _, _, rstd = rms_norm.forward(h, None, weight, EPS)
    for module in (reference, fused):
        late = module.rms_norm_backward_rows(made, None, h, weight, rstd, scales=(x_scale, w_scale))[2]
        early = module.rms_norm_backward_rows(want, None, h, weight, rstd)[2]
        assert errors(late, early)[0] < 4e-3


def test_no_tokens(device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        rows8, scale = module.quantize_rows(torch.empty(0, 16, device=device))
        assert rows8.shape == (0, 16)
        assert scale.shape == (0, 1)
        nothing = torch.empty(0, 16, device=device)
        rows8, scale, dx = module.rms_norm_backward_rows(nothing, nothing, nothing, nothing.new_empty(16), scale[:, 0])
        assert (rows8.shape, scale.shape, dx.shape) == ((0, 16), (0, 1), (0, 16))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_go_through(value: float, device: torch.device, fused: ModuleType) -> None:
    """A run is stopped by NaN, so no kernel may make a number of it."""
    good = normal(3, 96, dtype=torch.bfloat16, device=device, seed=1)
    bad = good.clone()
    bad[0, 5], bad[1] = value, value
    factor = torch.ones(16, device=device)
    for module in (reference, fused):
        made = [module.quantize_rows(bad, 128), module.swiglu_rows(bad, good, 128)[:2],
                backward_rows(module, bad, good, again=False)[:2],
                module.rms_norm_backward_rows(good, bad, good, good[0], factor[:3])[:2]]  # fmt: skip
        for rows8, _ in made:
            assert rows8[:, :96].float().isnan().any(1).tolist() == [True, True, False]
        a8, a_scale = reference.quantize_rows(normal(16, 96, dtype=torch.bfloat16, device=device, seed=2))
        low = module.rank_product(*made[0], a8, a_scale, factor, torch.bfloat16)
        assert low.isnan().all(1).tolist() == [True, True, False]
        assert made[0][0][:, 96:112].float().isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("tl.div_rn(LARGEST, amax)", "tl.div_rn(LARGEST, amax) * 2"), id="range exceeded twice"),
        pytest.param(("tl.div_rn(amax, LARGEST)", "amax"), id="scale not divided"),
        pytest.param(("tl.abs(value)", "value"), id="largest instead of largest magnitude"),
        pytest.param(("/ num_features + eps", "/ BLOCK_K + eps"), id="mean over the padded row"),
        pytest.param(("rstd * (dnormed - normed * inner)", "rstd * dnormed"), id="backward of a norm without its mean"),
        pytest.param(("value = dx.to(tl.float32)", "value = normed"), id="rows of another value than dx"),
        pytest.param(("dx += tl.load(dsum_ptr", "dx = tl.load(dsum_ptr"), id="gradient from above alone"),
        pytest.param(("gate * tl.sigmoid(gate) * up", "tl.maximum(gate, 0.0) * up"), id="relu for silu"),
        pytest.param(("+ num_features + k, dup", "+ num_features + k, dgate"), id="gradient of gate in up's place"),
        pytest.param(("tl.maximum(largest, ", "tl.maximum(0.0 * largest, "), id="largest of the last piece"),
        pytest.param(("(qb * cos - qa * sin)", "(qb * cos + qa * sin)"), id="half of a head turned the wrong way"),
        pytest.param(("tl.maximum(most_q, tl.maximum(most_k, most_v))", "most_q"), id="largest of q alone"),
        pytest.param(("(num_query_heads + num_key_heads) * 2", "num_query_heads * 2"), id="v in the place of k"),
    ],
)
def test_named_wrong_kernels_fail(edit, dtype, device, fused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    wrong = mutant(fused, [edit], tmp_path)
    wrong.PIECE = 32  # a row in several pieces
    assert faults(wrong, (3, 100), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_pieces(dtype, device, fused, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fused, "PIECE", 32)
    assert not faults(fused, (3, 100), dtype, device)


WIDTHS, RANKS, IN_FEATURES, SCALE = (24, 16, 8), (4, 0, 2), 512, 2.0


class Side(NamedTuple):
    """One of the two products of a group with an adapter."""

    rows: Tensor
    copy: Tensor
    low_copy: Tensor
    low: Tensor
    result: Tensor
    exact: Tensor
    exact_low: Tensor


def sides(module: ModuleType, device: torch.device, size: float, dead: bool = False) -> tuple[Side, Side]:
    """y = x Wᵀ + s x Aᵀ Bᵀ and dx = dy W + s dy B A, for three maps of which the middle one has no adapter."""
    out_features, ranks = sum(WIDTHS), sum(RANKS)
    x, dy = (normal(5, n, dtype=torch.bfloat16, device=device, seed=n) for n in (IN_FEATURES, out_features))
    w = normal(out_features, IN_FEATURES, dtype=torch.float32, device=device, seed=7, scale=0.02)
    if dead:
        w[5], w[:, 7] = 0, 0
    a = normal(ranks, IN_FEATURES, dtype=torch.bfloat16, device=device, seed=8, scale=0.06)
    b = normal(out_features, max(RANKS), dtype=torch.bfloat16, device=device, seed=9, scale=size)
    block_b = torch.zeros(out_features, ranks, device=device)
    block_b[:24, :4], block_b[40:, 4:] = b[:24].float(), b[40:, :2].float()
    table = column_table(WIDTHS, RANKS, device)
    scale_o, scale_i = matrix_scales(w)
    copies = reference.empty_copies(ranks, IN_FEATURES, out_features, device)
    module.copy_adapter(a, b, table, scale_o, scale_i, SCALE, copies)
    sum_w = w + SCALE * block_b @ a.float()
    forward = side(module, x, copies[1:3], copies.factors_4S[:2], (w, scale_o), (b, table))
    backward = side(module, dy, copies[3:], copies.factors_4S[2:], (w.t(), scale_i), (a.t(), None))
    exact = (x.float() @ sum_w.t(), x.float() @ a.float().t()), (dy.float() @ sum_w, dy.float() @ block_b)
    return Side(*forward, *exact[0]), Side(*backward, *exact[1])


def side(module, values, low_copy, factors, weight, adapter) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    (w, scale), columns = weight, num_columns(sum(RANKS))
    rows8, row_scale = module.quantize_rows(values, columns)
    low = module.rank_product(rows8, row_scale, *low_copy, factors[0], torch.bfloat16)
    copy = torch.empty(len(w), w.shape[1] + columns, dtype=torch.float8_e4m3fn, device=w.device)
    copy[:, : w.shape[1]] = (w / scale).to(torch.float8_e4m3fn)
    module.set_columns(copy, scale, w.shape[1], adapter[0], factors[1], adapter[1])
    dtype = torch.bfloat16 if w.is_cuda else torch.float32  # cuBLAS wants 16 bits
    result = module.product(rows8, row_scale, copy, scale, dtype)
    return rows8, copy, low_copy[0], low, result


@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-3, 0.05])
def test_columns_carry_the_adapter(size: float, device: torch.device, fused: ModuleType) -> None:
    for module in (reference, fused):
        for made, without in zip(sides(module, device, size), sides(module, device, 0.0), strict=True):
            assert made.rows.float().isfinite().all()
            assert made.copy.float().isfinite().all()
            assert errors(made.result, made.exact)[0] < 0.08
            if made.exact_low.any():
                assert errors(made.low, made.exact_low)[0] < 0.06
            if size and made.result.dtype == torch.float32:
                # what the adapter adds is as near as e4m3 allows, however small it is beside W x
                assert errors(made.result - without.result, made.exact - without.exact)[0] < 0.1
    for want, got in zip(sides(reference, device, size), sides(fused, device, size), strict=True):
        assert different(got.low_copy, want.low_copy) == 0
        assert different(got.copy, want.copy) < 0.002  # a factor's last bit may move a value over a rounding edge
        assert different(got.rows, want.rows) < 0.002


def test_more_ranks_than_a_program_has(device, fused, fused_adapter, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Rank 128 on q, k and v is 384 ranks; here 40, which take three programs of 16, and 88 columns are padding."""
    monkeypatch.setattr(fused_adapter, "LOW_SOURCES", 16)
    x, a = (normal(n, 96, dtype=torch.bfloat16, device=device, seed=n) for n in (70, 48))
    (a8, a_scale), factor = reference.quantize_rows(a), torch.linspace(0.5, 2, 40, device=device)
    found = []
    for module in (reference, fused):
        rows8, scale = reference.quantize_rows(x, 128)
        rows8[:, 96:] = torch.full((), 3.0, device=device).to(rows8.dtype)
        low = module.rank_product(rows8, scale, a8, a_scale, factor, torch.bfloat16)
        found.append((low, rows8))
    (want_low, want_rows), (low, rows8) = found
    assert errors(low, want_low)[0] < 4e-3
    assert different(rows8, want_rows) < 0.002
    assert not rows8[:, 136:].float().any()


@pytest.mark.parametrize("size", [1e-3, 0.01])
def test_rows_of_zeros_leave_the_adapter_room(size: float, device: torch.device, fused: ModuleType) -> None:
    """A column has one factor for all rows: a row with a tiny scale would push the others' values out of e4m3."""
    for module in (reference, fused):
        pairs = zip(sides(module, device, size, True), sides(module, device, 0.0, True), strict=True)
        for made, without in pairs:
            if made.result.dtype == torch.float32:
                assert errors(made.result - without.result, made.exact - without.exact)[0] < 0.1


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("row[:, None] < last[None, :]", "row[:, None] >= 0"), id="rows of another map"),
        pytest.param(("tl.load(column_ptr + s", "tl.load(first_ptr + s"), id="another column of B"),
        pytest.param(("value * factor[None, :]", "value"), id="no factor"),
        pytest.param(("a * tl.div_rn(LARGEST, amax)", "0.5 * a * tl.div_rn(LARGEST, amax)"), id="half of A"),
        pytest.param(("b8_ptr + s * num_out + row", "b8_ptr + s * num_out + row - first"), id="B in another place"),
        pytest.param(("mask=(row < num_rows)[:, None] & (s >= 0)[None, :]", "mask=inside"), id="padding not written"),
        pytest.param(("nothing, mask=row_in[:, None] & (s >= 0)", "nothing, mask=row_in[:, None] & (s < 0)"),
                     id="padding of rows not written"),
        pytest.param(("low.to(tl.float32) * factor[None, :]", "low.to(tl.float32)"), id="no factor of h"),
        pytest.param(("range(0, num_features, BLOCK_K):\n        k = start + tl.arange(0, BLOCK_K)\n        x = ",
                      "range(0, BLOCK_K, BLOCK_K):\n        k = start + tl.arange(0, BLOCK_K)\n        x = "),
                     id="first features alone"),
    ],
)  # fmt: skip
def test_wrong_columns_fail(edit, device, fused, fused_adapter, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    wrong = mutant(fused_adapter, [edit], tmp_path)
    wrong.quantize_rows, wrong.product = fused.quantize_rows, fused.product  # type: ignore[attr-defined]
    plain_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: plain_empty(*shape, **kind).fill_(3))
    want, got = sides(reference, device, 1e-3), sides(wrong, device, 1e-3)
    pairs = zip(want, got, strict=True)
    shares = [different(getattr(b, part), getattr(a, part)) for a, b in pairs for part in ("rows", "copy", "low_copy")]
    assert max(shares) > 0.002


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 4096), (1001, 11008), (77, 14336)])
def test_large(shape, dtype, fused) -> None:  # type: ignore[no-untyped-def]
    assert not faults(fused, shape, dtype, torch.device("cuda"))


@pytest.mark.gpu
def test_through_scaled_mm() -> None:
    fused = pytest.importorskip("chulengo.kernels.fused.fp8")
    x, w = (normal(512, 1024, dtype=torch.bfloat16, device=torch.device("cuda"), seed=s) for s in (1, 2))
    (x8, xs), (w8, ws) = fused.quantize_rows(x), fused.quantize_rows(w)
    y = torch._scaled_mm(x8, w8.t(), xs, ws.t(), out_dtype=torch.bfloat16)
    assert errors(y, x.double() @ w.double().t())[0] < 0.05
