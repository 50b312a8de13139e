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


def supervised_nll(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """Returns the summed negative log-likelihood of a batch's targets, in nats, and their number.

    Args:
        model: a causal or encoder-decoder model of transformers, plain, PEFT-wrapped or DDP-wrapped.
        batch: as `data.batches` makes it, on the model's device. In causal batches the label at position i is
            predicted from positions before i; in encoder-decoder batches labels are aligned with `decoder_ids`.

    Returns:
        fp32 scalar that carries gradients, and the number of targets in it.
    """
    base = base_model(model)
    labels = batch["labels"]
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    if "decoder_ids" in batch:
        inputs["decoder_input_ids"] = _shifted_right(batch["decoder_ids"], base)
        logits = model(**inputs, use_cache=False).logits
        targets = labels
    else:
        targets = labels[:, 1:]
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
            if len(columns) == 0:
                columns = torch.zeros(1, dtype=torch.int64, device=labels.device)
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
            targets = targets[:, columns]
        else:
            logits = model(**inputs, use_cache=False).logits[:, :-1]
    chosen = targets != IGNORE
    picked = targets[chosen]
    if len(picked) == 0:
        # keeps the graph, so that every rank has gradients (zeros) to exchange
        return logits.float().sum() * 0.0, 0
    return cross_entropy(logits[chosen].float(), picked, reduction="sum"), len(picked)


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
