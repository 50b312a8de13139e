"""BERTScore (Zhang et al. 2020): how well the tokens of two texts match by their contextual embeddings.

Every token of the answer is paired with the most similar token of the reference (cosine of hidden states): the mean is
precision; the same from the reference's side is recall; F1 is their harmonic mean. It rewards paraphrase, which n-gram
overlap cannot see, and it is blind to small words that turn a sentence round ("not"). Its values crowd together near
the top of the scale: look at differences, not at levels.

It is written here, in fp32 over `transformers`, because bert-score 0.3.13 fails under transformers 5 on an empty
candidate and on tokenizers without `model_max_length`, and takes padding for a token of similarity 0, so that a pair
with negative similarities scores otherwise beside a longer one. The rules are its rules: no idf weights, no rescaling,
special tokens carry no weight but may be matched; 55 pairs agreed within 2.4e-7 on four layers of a MiniLM. Three
things are stated where it leaves them open. The encoder is a local folder, and a hash of its files is part of the
version. The layer is the last one unless another is named (bert-score has a table of tuned layers for well-known
encoders, such as 17 for roberta-large and 9 for bert-base-uncased: name that layer to be comparable). A text without
any token gives 0 on either side.

Texts longer than the encoder's limit are cut at its end, and counted. Of several references the one with the best F1
gives all three numbers; bert-score takes the best of each by itself, which changes precision and recall, not F1.

The encoder is loaded for one set of answers and freed; the three metrics share what was computed. It takes its weights
in fp32 (roberta-large: 1.3 GiB), what encoding `BATCH_TOKENS` padded tokens takes (there some 0.3 GiB; where a layer is
named, all layers' states of them as well, 0.4 GiB), and the vectors of `HELD_TOKENS` tokens (64 MiB).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chulengo.errors import ConfigError, ModelError
from chulengo.evaluate.metrics.metric import Counts, Metric, Outcome, ratio
from chulengo.evaluate.metrics.references import references_of
from chulengo.model.folder import check_folder, is_encoder_decoder, read_config, weights_hash

PARTS = ("precision", "recall", "f1")
BATCH_TOKENS = 4096  # that are encoded at once, padding included; a longer text alone
HELD_TOKENS = 16_384  # whose vectors are held at once, but always those of one item
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)
_DECODER = re.compile(r"(ForCausalLM|(?<!With)LMHeadModel|DoubleHeadsModel)$")  # XLMWithLMHeadModel is an encoder
_ALLOWED = "a local folder of a text encoder (BERT, RoBERTa, MiniLM, ...): config.json, model.safetensors, tokenizer"
_Pair = tuple[str, tuple[str, ...]]
_Pairs = tuple[_Pair, ...]
_Tokens = tuple[list[int], list[int], bool]  # ids, which of them are special, whether the text was cut


class MissingEncoderError(ConfigError):
    """BERTScore was asked for and there is no encoder: show it as not computed."""


@dataclass(frozen=True, slots=True)
class _Encoder:
    tokenizer: Any
    model: Any
    layer: int | None  # None: the last, which needs no other kept
    max_tokens: int | None
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Embedded:
    vectors: Any  # [tokens, width] fp32, each of length 1
    weights: Any  # [tokens] fp32: 0 for special tokens, else 1
    was_cut: bool


def bertscore(part: str, encoder: Path | None, *, layer: int | None = None, batch_size: int = 32) -> Metric:
    """Returns one of the three metrics; nothing heavy is loaded before it counts.

    Args:
        part: one of `PARTS`.
        encoder: folder of the encoder.
        layer: whose hidden states are compared, 1 for the first layer's output; None: the last.
        batch_size: most texts that are encoded at once; fewer where they are more than `BATCH_TOKENS` tokens.

    Raises:
        MissingEncoderError: no encoder is given.
        ModelError: the folder holds no encoder.
    """
    if encoder is None:
        raise MissingEncoderError(
            "not computed: no encoder", allowed=_ALLOWED, next_step="--encoder FOLDER, or leave out bertscore"
        )
    name = f"bertscore_{part}"
    num_layers = check_encoder(encoder)
    chosen = _chosen_layer(layer, num_layers, encoder)
    files_hash = encoder_hash(encoder)

    def count(outcomes: Sequence[Outcome]) -> Counts:
        own = references_of(outcomes, name)
        pairs = tuple((outcome.answer, references) for outcome, references in zip(outcomes, own, strict=True))
        table = _scores(encoder, files_hash, chosen, batch_size, pairs)
        values = table[:, PARTS.index(part)]
        return np.stack([values, np.ones(len(values)), table[:, 3], table[:, 4]], axis=1)

    what = {
        "precision": "mean over the answer's tokens of the highest cosine similarity with a token of the reference",
        "recall": "mean over the reference's tokens of the highest cosine similarity with a token of the answer",
        "f1": "harmonic mean of BERTScore precision and recall",
    }[part]
    return Metric(
        name, f"{name}/1 encoder:{files_hash[:16]} layer:{chosen}/{num_layers}",
        f"Mean over items of the {what}, against the reference with the best F1. Encoder '{encoder.name}' "
        f"(sha256 {files_hash[:16]}…), hidden states of layer {chosen} of {num_layers}, fp32, no idf, no rescaling; an "
        "empty text gives 0, a text over the encoder's limit is cut there.",
        "share", True, ("sum", "items", "cut_answers", "cut_references"), count, ratio,
    )


def encoder_hash(folder: Path) -> str:
    """Returns a hash over the encoder's config, weights and tokenizer files, as hexadecimal digits."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return _hash_of(folder, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _hash_of(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256(weights_hash(folder).encode())
    for name, _, _ in state:
        if name in _TOKENIZER_FILES:
            content = (folder / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def check_encoder(folder: Path) -> int:
    """Returns the number of layers of the encoder in the folder, from its config alone.

    Raises:
        ModelError: there is no folder, no complete model in it, no tokenizer, or a model that is no encoder.
    """
    advice = "--encoder FOLDER with an encoder in it, or no --encoder (BERTScore is left out then)"
    if not folder.is_dir():
        raise ModelError(f"There is no encoder folder {str(folder)!r}.", allowed=_ALLOWED, next_step=advice)
    try:
        config = read_config(check_folder(folder))
    except ModelError as error:
        raise ModelError(
            f"The encoder for BERTScore cannot be used: {error.given}", allowed=_ALLOWED, next_step=advice
        ) from error
    architectures = [str(name) for name in config.get("architectures") or ()]
    decodes = any(_DECODER.search(name) for name in architectures)
    layers = next((config[key] for key in ("num_hidden_layers", "n_layers", "num_layers") if key in config), None)
    if decodes or is_encoder_decoder(config) or not isinstance(layers, int):
        raise ModelError(
            f"{folder} holds {', '.join(architectures) or config['model_type']}, which is no text encoder.",
            allowed=_ALLOWED, next_step=advice,
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES if name.startswith(("tokenizer.", "vocab", "s"))):
        raise ModelError(f"{folder} holds an encoder without its tokenizer.", allowed=_ALLOWED, next_step=advice)
    return layers


def _chosen_layer(layer: int | None, num_layers: int, folder: Path) -> int:
    if layer is None:
        return num_layers
    if not 1 <= layer <= num_layers:
        raise ConfigError(
            f"Layer {layer} of the encoder in {folder} was asked for; it has {num_layers} layers.",
            allowed=f"1 to {num_layers}",
        )
    return layer


@lru_cache(maxsize=4)  # base and tuned, of two runs; precision, recall and F1 ask for the same
def _scores(folder: Path, files_hash: str, layer: int, batch_size: int, pairs: _Pairs) -> NDArray[np.float64]:
    """Returns precision, recall, F1, cut answers, cut references of each pair: [pairs, 5].

    Args:
        folder: of the encoder.
        files_hash: of its files; only tells cached results apart.
        layer: whose hidden states are compared.
        batch_size: most texts that are encoded at once.
        pairs: answer and references.
    """
    from chulengo.model.load import quiet_libraries

    del files_hash
    with quiet_libraries():
        encoder = _load(folder, layer, batch_size)
    table: list[tuple[float, ...]] = []
    for chunk, tokenised in _chunks(encoder, pairs):
        embedded = _embed(encoder, tokenised)
        for answer, references in chunk:
            scores = [_match(embedded[answer], embedded[reference]) for reference in references]
            best = max(scores, key=lambda score: score[2])
            cut_references = sum(embedded[reference].was_cut for reference in references)
            table.append((*best, embedded[answer].was_cut, cut_references))
        del embedded  # not beside the next chunk's
    return np.array(table, np.float64).reshape(-1, 5)


def _chunks(encoder: _Encoder, pairs: _Pairs) -> Iterator[tuple[list[_Pair], dict[str, _Tokens]]]:
    """Yields pairs whose vectors are held together, in order, and the tokens of their texts."""
    chunk: list[_Pair] = []
    tokenised: dict[str, _Tokens] = {}
    for answer, references in pairs:
        own = {text: _token_ids(encoder, text.strip()) for text in (answer, *references)}
        if chunk and sum(len(ids) for ids, _, _ in (tokenised | own).values()) > HELD_TOKENS:
            yield chunk, tokenised
            chunk, tokenised = [], {}
        chunk.append((answer, references))
        tokenised |= own
    if chunk:
        yield chunk, tokenised


def _load(folder: Path, layer: int, batch_size: int) -> _Encoder:
    """Returns the encoder in fp32, on the GPU where there is one.

    Raises:
        ModelError: transformers cannot load it, or its file lacks weights, which would be random.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"The encoder in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}", allowed=_ALLOWED,
            next_step="--encoder FOLDER with an encoder in it, or leave out bertscore",
        ) from error
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # the pooler is not used
    if missing:
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} tensors of the encoder, such as {missing[0]}.",
            allowed=_ALLOWED, next_step="copy or download the encoder again",
        )
    model.eval().requires_grad_(False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    is_last = layer == model.config.num_hidden_layers
    return _Encoder(tokenizer, model, None if is_last else layer, _max_tokens(tokenizer, model), batch_size)


def _max_tokens(tokenizer: Any, model: Any) -> int | None:
    """Returns how many tokens the encoder can see, special ones included; None without a limit."""
    limits = [tokenizer.model_max_length]  # 1e30 where the tokenizer states none
    if getattr(model.config, "max_position_embeddings", 0) > 0:
        limits.append(model.config.max_position_embeddings)
    for name, module in model.named_modules():
        # RoBERTa and its kin start positions after the padding index: 514 rows are 512 positions
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return int(min(limits)) if min(limits) < 1_000_000 else None


def _embed(encoder: _Encoder, tokenised: dict[str, _Tokens]) -> dict[str, _Embedded]:
    """Returns the embedded tokens of every text; texts of like length share a batch."""
    import torch

    pad = encoder.tokenizer.pad_token_id or 0
    embedded: dict[str, _Embedded] = {}
    for batch in _batches(encoder, tokenised):
        rows = [tokenised[text][0] for text in batch]
        width = max(1, *map(len, rows))
        device = encoder.model.device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            kept = encoder.layer is not None
            output = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=kept)
            states = output.hidden_states[encoder.layer] if kept else output.last_hidden_state
            vectors = torch.nn.functional.normalize(states, dim=-1)
        for text, own, row in zip(batch, vectors, rows, strict=True):
            _, special, was_cut = tokenised[text]
            weights = torch.tensor([0.0 if flag else 1.0 for flag in special], device=device)
            embedded[text] = _Embedded(own[: len(row)].clone(), weights, was_cut)
        del output, states, vectors, own  # not beside those of the next batch
    return embedded


def _batches(encoder: _Encoder, tokenised: dict[str, _Tokens]) -> Iterator[list[str]]:
    """Yields texts that are encoded together, from the shortest on."""
    batch: list[str] = []
    for text in sorted(tokenised, key=lambda text: (len(tokenised[text][0]), text)):
        padded = (len(batch) + 1) * len(tokenised[text][0])  # none before it is longer
        if batch and (len(batch) == encoder.batch_size or padded > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _token_ids(encoder: _Encoder, text: str) -> _Tokens:
    """Returns the ids of a text, which of them are special, and whether the text was cut."""
    # split_special_tokens: "[SEP]" or "</s>" in an answer is text, not the end of it
    call: Callable[..., Any] = partial(encoder.tokenizer, return_special_tokens_mask=True, split_special_tokens=True)
    row = call(text, verbose=False)
    was_cut = encoder.max_tokens is not None and len(row["input_ids"]) > encoder.max_tokens
    if was_cut:
        row = call(text, truncation=True, max_length=encoder.max_tokens)
    return row["input_ids"], row["special_tokens_mask"], was_cut


def _match(answer: _Embedded, reference: _Embedded) -> tuple[float, float, float]:
    """Returns precision, recall and F1 of two embedded texts; 0 where one has no token that counts."""
    if not bool(answer.weights.any()) or not bool(reference.weights.any()):
        return 0.0, 0.0, 0.0
    similarity = answer.vectors @ reference.vectors.T
    precision = float((similarity.amax(dim=1) * answer.weights).sum() / answer.weights.sum())
    recall = float((similarity.amax(dim=0) * reference.weights).sum() / reference.weights.sum())
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
