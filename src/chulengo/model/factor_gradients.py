"""The gradients of an adapter's factors, added in place to what is there.

They need neither the weight nor the folded matrix: with x the map's input, h = x Aᵀ and u = dy B,

    dA = s uᵀ x      dB = s dyᵀ h

plain products, of all maps that share x together where their inputs are the same. `model/linear_group.py` has the
products themselves, and the legend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chulengo.kernels import ops
from chulengo.model.dropout import MaskSeed
from chulengo.model.linear_group import LinearGroup, Matrices, adapted_maps, dropped_input


def add_factor_gradients(
    x_TI: Tensor | None, h_TS: Tensor | None, dy_TO: Tensor, u_TS: Tensor | None, group: LinearGroup,
    matrices: Matrices, seed: MaskSeed | None, y_TO: Tensor | None = None,
) -> None:
    """Adds the gradients of a group's trainable factors to their `grad`, zeros where there is none yet.

    Here and not by autograd, which adds every tensor with a kernel of its own: 448 of 2 us for Llama 2 7B (H200).

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
    if x_TI is None or matrices.form is None:
        return
    of_pairs, of_magnitudes = _factor_gradients(x_TI, h_TS, dy_TO, u_TS, group, matrices, seed, y_TO)
    pairs = [pair for pair in group.factors if pair is not None]
    _add_to([factor for pair in pairs for factor in (pair.a_RI, pair.b_OR)], of_pairs, matrices.form.scale)
    _add_to([pair.magnitude_O for pair in pairs if pair.magnitude_O is not None], of_magnitudes, 1.0)


def _factor_gradients(
    x_TI: Tensor, h_TS: Tensor | None, dy_TO: Tensor, u_TS: Tensor | None, group: LinearGroup, matrices: Matrices,
    seed: MaskSeed | None, y_TO: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the gradients of A and B of every adapted map, without the scale s in them, and of the magnitudes."""
    form, copies = matrices.form, group.copies
    if form is None or copies is None:
        return [], []
    das, dbs = [], []
    members = list(adapted_maps(group, copies, torch.split(dy_TO, group.widths, dim=1)))
    if u_TS is None:  # every map has an input of its own
        for index, dy_TN, a_RI, b_OR, _ in members:
            own_TI = dropped_input(x_TI, matrices, seed, index)
            das.append(_product_fp32((dy_TN @ b_OR).t(), own_TI))
            dbs.append(_product_fp32(dy_TN.t(), own_TI @ a_RI.t()))
    else:
        if h_TS is None:
            h_TS = x_TI @ copies.stacked_a_SI.t()
        dbs += [_product_fp32(dy_TN.t(), h_TS[:, columns]) for _, dy_TN, _, _, columns in members]
        das += torch.split(_product_fp32(u_TS.t(), x_TI), [len(a_RI) for _, _, a_RI, _, _ in members])
    gradients = [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]
    return gradients, _magnitude_gradients(dbs, dy_TO, y_TO, group, matrices.backend) if group.rescaled else []


def _add_to(factors: Sequence[nn.Parameter], gradients: Sequence[Tensor], scale: float) -> None:
    """Adds gradients times a scale, in one kernel for them all."""
    places, values = [], []
    for factor, gradient in zip(factors, gradients, strict=True):
        if factor.requires_grad:
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            places.append(factor.grad)
            values.append(gradient)
    if places:
        torch._foreach_add_(places, values, alpha=scale)


def _magnitude_gradients(
    dbs: Sequence[Tensor], dy_TO: Tensor, y_TO: Tensor | None, group: LinearGroup, backend: str
) -> list[Tensor]:
    """Returns dm of every map that has a magnitude, and makes its dB (one for each adapted map) that of scaled rows."""
    copies = group.copies
    assert copies is not None, "made by `Matrices.refresh`"
    assert y_TO is not None, "the layers keep the output of rescaled maps"
    biases = [None] * len(group.widths) if group.bias_O is None else torch.split(group.bias_O, group.widths)
    values = zip(*(torch.split(each_TO, group.widths, dim=1) for each_TO in (dy_TO, y_TO)), biases, strict=True)
    found, remaining = [], iter(dbs)
    for (dy_TN, y_TN, bias_O), rescaling, a_RI in zip(values, copies.rescaling, copies.a_RI, strict=True):
        db_OR = None if a_RI is None else next(remaining)
        if db_OR is not None and rescaling is not None:
            db_OR *= rescaling.scale_O[:, None]
            found.append(ops.column_dot(dy_TN, y_TN, bias_O, backend=backend) / rescaling.magnitude_O)
    return found


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in float32, as the product is accumulated; without a GPU 16-bit operands round it first."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
