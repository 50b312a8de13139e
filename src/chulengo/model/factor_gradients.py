"""The gradients of an adapter's factors, added in place to what is there.

They need neither the weight nor the folded matrix: with x the map's input, h = x Aᵀ and u = dy B,

    dA = s uᵀ x      dB = s dyᵀ h

plain products, of all maps that share x together where their inputs are the same. On a GPU they are accumulated in
float32 and added by the product itself to the gradient, which for all A of a group is one matrix (`LinearGroup.
parameters`): autograd would add every tensor with a kernel of its own, 448 of 2 us for Llama 2 7B (H200), and one
kernel for each group's took 19 us. `model/linear_group.py` has the products themselves, and the legend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chulengo.kernels import ops
from chulengo.model.dropout import MaskSeed
from chulengo.model.linear_group import Factors, LinearGroup, Matrices, adapted_maps, dropped_input


def add_factor_gradients(
    x_TI: Tensor | None, h_TS: Tensor | None, dy_TO: Tensor, u_TS: Tensor | None, group: LinearGroup,
    matrices: Matrices, seed: MaskSeed | None, y_TO: Tensor | None = None,
) -> None:
    """Adds the gradients of a group's trainable factors to their `grad`, zeros where there is none yet.

    Args:
        x_TI: the input, as in the forward; None only where no map of the group has an adapter.
        h_TS: x Aᵀ, where the forward made and kept it.
        dy_TO: gradient of `multiply`'s result.
        u_TS: `rank_gradient` of it.
        group: the maps.
        matrices: as in the forward.
        seed: as in the forward.
        y_TO: `multiply`'s result, for magnitudes.
    """  # fmt: skip
    form, copies = matrices.form, group.copies
    if x_TI is None or form is None or copies is None:
        return
    pairs = [pair for pair in group.factors if pair is not None]
    members = list(adapted_maps(group, copies, torch.split(dy_TO, group.widths, dim=1)))
    if u_TS is None:  # every map has an input of its own
        for pair, (index, dy_TN, a_RI, b_OR, _) in zip(pairs, members, strict=True):
            own_TI = dropped_input(x_TI, matrices, seed, index)
            _add_product([pair.a_RI], (dy_TN @ b_OR).t(), own_TI, form.scale)
            _add_product([pair.b_OR], dy_TN.t(), own_TI @ a_RI.t(), form.scale)
        return
    if h_TS is None:
        h_TS = x_TI @ copies.stacked_a_SI.t()
    _add_product([pair.a_RI for pair in pairs], u_TS.t(), x_TI, form.scale)
    for pair, (index, dy_TN, _, _, columns) in zip(pairs, members, strict=True):
        if pair.magnitude_O is None:
            _add_product([pair.b_OR], dy_TN.t(), h_TS[:, columns], form.scale)
        else:
            assert y_TO is not None, "the layers keep the output of rescaled maps"
            _add_rescaled(pair, index, dy_TN, h_TS[:, columns], y_TO, group, matrices)


def _add_rescaled(
    pair: Factors, index: int, dy_TN: Tensor, h_TR: Tensor, y_TO: Tensor, group: LinearGroup, matrices: Matrices
) -> None:
    """Adds the gradients of B, which is scaled by row, and of the magnitude of one map."""
    copies = group.copies
    assert copies is not None, "made by `Matrices.refresh`"
    assert matrices.form is not None, "as above"
    rescaling, bias_O = copies.rescaling[index], None
    assert rescaling is not None, "there is a magnitude"
    assert pair.magnitude_O is not None, "asked for only where there is one"
    if group.bias_O is not None:
        bias_O = torch.split(group.bias_O, group.widths)[index]
    db_OR = _product_fp32(dy_TN.t(), h_TR) * rescaling.scale_O[:, None]
    _add(pair.b_OR, db_OR, matrices.form.scale)
    y_TN = torch.split(y_TO, group.widths, dim=1)[index]
    dm_O = ops.column_dot(dy_TN, y_TN, bias_O, backend=matrices.backend) / rescaling.magnitude_O
    _add(pair.magnitude_O, dm_O, 1.0)


def _add_product(factors: Sequence[nn.Parameter], left: Tensor, right: Tensor, scale: float) -> None:
    """Adds scale times left @ right to the gradients of factors, whose rows follow each other in it."""
    whole = None
    if all(factor.requires_grad for factor in factors):
        whole = one_behind_the_other([_gradient(factor) for factor in factors])
    if whole is None:
        parts = torch.split(_product_fp32(left, right), [len(factor) for factor in factors])
        for factor, part in zip(factors, parts, strict=True):
            _add(factor, part, scale)
    elif _sums_in_fp32(left):
        torch.addmm(whole, left, right, out_dtype=torch.float32, alpha=scale, out=whole)
    else:
        whole.add_(_product_fp32(left, right), alpha=scale)


def _add(factor: nn.Parameter, gradient: Tensor, scale: float) -> None:
    if factor.requires_grad:
        _gradient(factor).add_(gradient, alpha=scale)


def _gradient(factor: nn.Parameter) -> Tensor:
    """Returns what there is of a factor's gradient, zeros where there is nothing yet."""
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    return factor.grad


def one_behind_the_other(parts: Sequence[Tensor]) -> Tensor | None:
    """Returns one view [sum of rows, columns] of matrices that follow each other in one memory; None: they do not."""
    first, end = parts[0], parts[0].data_ptr()
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.untyped_storage().data_ptr() != memory or part.data_ptr() != end:
            return None
        end += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), first.shape[1]), (first.shape[1], 1))


def _sums_in_fp32(left: Tensor) -> bool:
    """Returns whether a product of 16-bit values is to be had in float32, as it is accumulated."""
    return left.is_cuda and left.dtype != torch.float32


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in float32, as the product is accumulated; without a GPU 16-bit operands round it first."""
    if _sums_in_fp32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
