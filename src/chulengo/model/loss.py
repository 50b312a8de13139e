"""The one loss: the summed negative log-likelihood of the supervised tokens, in fp32.

A sum and a count, not a mean: the mean over the accumulated, all-rank batch is taken once, by whoever knows the whole
count, so that no split of a batch changes it. Training, validation and the perplexity score call this function.

Only positions with a target go through the head: transformers' `logits_to_keep` takes the columns in which any row of
the batch has one. With answers-only training that is often less than half of a batch, and for a vocabulary of 32,000
the fp32 logits are the largest tensor of a step (batch 4 x 2,048 tokens: 1.05 GB). The loss in fp32 costs nothing
beside that, and 16-bit log-probabilities would have an error of 1e-2.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from chulengo.data.batches import IGNORE
from chulengo.model.fast import FastModel

TARGETS_AT_ONCE = 2048  # x 32,000 pieces x 4 bytes: 262 MB


def supervised_nll(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Returns the summed negative log-likelihood of a batch's targets, in nats, and their number.

    Args:
        model: a causal or encoder-decoder model of transformers, plain, PEFT-wrapped or DDP-wrapped.
        batch: as `data.batches` makes it, on the model's device. In causal batches the label at position i is
            predicted from positions before i; in encoder-decoder batches labels are aligned with `decoder_ids`.

    Returns:
        fp32 scalar that carries gradients, and the number of targets in it.
    """
    logits, targets, _ = _target_logits(model, batch)
    chosen = targets != IGNORE
    picked = targets[chosen]
    if len(picked) == 0:
        # keeps the graph, so that every rank has gradients (zeros) to exchange
        return logits.float().sum() * 0.0, 0
    return cross_entropy(logits[chosen].float(), picked, reduction="sum"), len(picked)


@torch.no_grad()
def target_nll(model: nn.Module | FastModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what every single target of a batch gives, for scores that keep apart what a batch puts together.

    The fp32 copies of the logits are made for `TARGETS_AT_ONCE` targets at a time, since no graph needs them whole.

    Args:
        model: see `supervised_nll`; or the fast engine's.
        batch: see `supervised_nll`; on any device.

    Returns:
        For each of the K targets, in the order of the batch: its negative log-likelihood in nats (fp32 [K]), whether
        it is the likeliest token (bool [K]), and its row and column in `batch["labels"]` (int64 [K, 2]).
    """
    if isinstance(model, FastModel):
        return model.target_nll(batch)
    on_device = {name: value.to(base_model(model).device) if torch.is_tensor(value) else value
                 for name, value in batch.items()}  # fmt: skip
    logits, targets, columns = _target_logits(model, on_device)
    places = (targets != IGNORE).nonzero()
    nll, hit = [logits.new_zeros(0, dtype=torch.float32)], [torch.zeros(0, dtype=torch.bool, device=logits.device)]
    for part in torch.split(places, TARGETS_AT_ONCE):
        rows, taken = part.unbind(1)
        some, wanted = logits[rows, taken].float(), targets[rows, taken]
        nll.append(cross_entropy(some, wanted, reduction="none"))
        hit.append(some.argmax(-1) == wanted)
    return torch.cat(nll), torch.cat(hit), torch.stack([places[:, 0], columns[places[:, 1]]], dim=1)


def _target_logits(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits [rows, C, vocabulary], targets [rows, C], and the column of `labels` each of the C stands for."""
    base = base_model(model)
    labels = batch["labels"]
    columns = torch.arange(labels.shape[1], device=labels.device)
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    if "decoder_ids" in batch:
        inputs["decoder_input_ids"] = _shifted_right(batch["decoder_ids"], base)
        return model(**inputs, use_cache=False).logits, labels, columns
    targets = labels[:, 1:]
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return model(**inputs, use_cache=False).logits[:, :-1], targets, columns[1:]
    kept = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    if len(kept) == 0:
        kept = torch.zeros(1, dtype=torch.int64, device=labels.device)
    return model(**inputs, logits_to_keep=kept, use_cache=False).logits, targets[:, kept], kept + 1


def base_model(model: nn.Module) -> Any:
    """Returns the transformers model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _shifted_right(ids: Tensor, base: Any) -> Tensor:
    # the model's own prepare_decoder_input_ids_from_labels would put padding where a token carries no loss
    start = base.config.decoder_start_token_id
    if start is None:
        start = base.config.pad_token_id
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted
