"""The fast engine's plan against steps measured on one H200, and what it chooses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chulengo.errors import DoesNotFitError
from chulengo.model.plan import DeviceMemory, TrainingMemory, changed_memory, needed_bytes
from chulengo.model.plan_fast import Policies, graphs_of, pinned_bytes, predict_fast
from chulengo.model.plan_policies import Wanted, check_room, choose_policies, plan_run, smallest_run_change
from chulengo.model.plan_shapes import ModelShape, read_shape
from chulengo.model.plan_speed import H200, predict_step

GIB = 1 << 30
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "nvidia-h200"
SIZES = {"7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40), "70b": (8192, 28672, 80, 64, 8)}


def config_of(name: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads = SIZES[name]
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32000,
    }  # fmt: skip


def shape_of(name: str) -> ModelShape:
    shape = read_shape(config_of(name))
    assert shape is not None
    return shape


def measured_rows() -> list[Any]:
    rows = []
    for name in ("plan_steps", "paired_steps"):
        lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if row["engine"] == "fast"]
        rows += [pytest.param(row, id=f"{name}-{number}") for number, row in enumerate(found)]
    return rows


def run_of(row: dict[str, Any]) -> tuple[ModelShape, TrainingMemory, Policies]:
    shape = shape_of(row["shape"])
    policies = row["activations"].split("+")
    first = shape.num_layers if len(policies) == 1 else row["first"]
    activations = (policies[0],) * first + (policies[-1],) * (shape.num_layers - first)
    where = "host" if row["host_embeddings"] else "device"
    settings = TrainingMemory(row["batch"], row["seq"], rank=row["rank"], optimizer=row["optimizer"])
    return shape, settings, Policies(row["weights"], activations, where, row["graphs"])


@pytest.mark.parametrize("row", measured_rows())
def test_memory_and_speed_of_measured_steps(row: dict[str, Any]) -> None:
    shape, settings, policies = run_of(row)
    speed = predict_step(shape, settings, policies, H200).tokens_per_s
    assert speed == pytest.approx(row["tokens_per_s"], rel=0.125)
    if "memory_before" in row:  # of a form that needed more; the files have newer rows for the same policies
        assert predict_fast(shape, settings, policies).peak_bytes <= 1.03 * row["peak_gib"] * GIB
        return
    # without a graph and with hardly any activations, cuBLAS's second workspace shows, 32 MiB for each of two threads
    rel = 0.03 if row["batch"] * row["seq"] == 512 and not row["graphs"] else 0.01
    assert predict_fast(shape, settings, policies).peak_bytes == pytest.approx(row["peak_gib"] * GIB, rel=rel)


def test_there_is_enough_to_compare_with() -> None:
    rows = [param.values[0] for param in measured_rows()]
    current = [row for row in rows if "memory_before" not in row]
    assert len(current) >= 12
    assert {row["activations"] for row in current} >= {"keep", "selective", "offload"}
    assert {row["weights"] for row in current} >= {"stream", "resident", "resident-fp8"}


def test_launches_wait_only_without_a_graph() -> None:
    shape, settings = shape_of("7b"), TrainingMemory(1, 512)
    keep = ("keep",) * 32
    eager = predict_step(shape, settings, Policies("stream", keep), H200)
    graph = predict_step(shape, settings, Policies("stream", keep, graphs=True), H200)
    assert eager.seconds == pytest.approx(32 * 6.6e-3)
    assert graph.parts["waiting for launches"] == 0
    assert graph.seconds < eager.seconds / 3
    again = predict_step(shape, settings, Policies("stream", ("full",) * 32), H200)
    assert 0.28 < again.seconds < 0.42  # as measured
    large = predict_step(shape, replace(settings, batch_size=16), Policies("stream", keep), H200)
    assert large.parts["waiting for launches"] == 0
    assert large.to_dict()["seconds"] == sum(large.to_dict()["parts_s"].values())


CARDS = [5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 139]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 512), (1, 2048), (4, 2048)])
def test_memory_is_filled_and_not_more(batch: int, tokens: int, optimizer: str) -> None:
    shape, settings = shape_of("7b"), TrainingMemory(batch, tokens, optimizer=optimizer)
    seconds = math.inf
    for gib in CARDS:
        policies = choose_policies(shape, settings, gib * GIB)
        if policies is None:
            assert math.isinf(seconds), "what fits a smaller card fits"
            continue
        plan = predict_fast(shape, settings, policies)
        assert needed_bytes(plan) <= gib * GIB
        taken = predict_step(shape, settings, policies, H200).seconds
        assert taken <= seconds * (1 + 1e-9), "more memory, no slower"
        seconds = taken
        kept = policies.activations.count("selective")
        if 0 < kept < 32:  # one layer more would not have fitted
            assert plan.device_bytes <= gib * GIB
            again = (policies.activations[-1],) * (31 - kept)
            more = replace(policies, activations=("selective",) * (kept + 1) + again)
            assert predict_fast(shape, settings, more).device_bytes > gib * GIB
    assert not math.isinf(seconds)


def test_the_order_of_policies() -> None:
    shape, settings = shape_of("7b"), TrainingMemory(4, 2048)
    found = [choose_policies(shape, settings, gib * GIB // 4) for gib in range(200, 20, -1)]
    said = [p.describe() for p in found if p is not None]
    order = [next(iter(group)) for group in (list(g) for _, g in itertools.groupby(said))]
    assert order[:5] == ["weights resident, activations selective",
                         "weights resident, activations selective in 31 layers, offload in 1 layer",
                         "weights resident, activations selective in 30 layers, offload-attention in 2 layers",
                         "weights stream, activations keep", "weights stream, activations selective"]
    assert order[-3:] == ["weights stream, activations offload-attention",
                          "weights stream, activations offload-attention, embeddings on the host",
                          "weights stream, activations offload, embeddings on the host"]  # fmt: skip
    assert found[-1] is None
    assert choose_policies(shape, settings, 80 * GIB) == Policies("resident", ("keep",) * 32)


@pytest.mark.parametrize(("gib", "batch", "tokens", "said"), [
    (8, 1, 2048, "weights stream, activations selective in 10 layers, offload-attention in 22 layers, graphs"),
    (12, 1, 2048, "weights stream, activations selective, graphs"),
    (16, 1, 2048, "weights stream, activations keep, graphs"),
    (24, 1, 2048, "weights resident, activations selective, graphs"),
    (8, 4, 2048, "weights stream, activations offload-attention"),
    (12, 4, 2048, "weights stream, activations selective in 6 layers, offload-attention in 26 layers"),
    (16, 4, 2048, "weights stream, activations selective in 12 layers, offload-attention in 20 layers"),
    (24, 4, 2048, "weights stream, activations selective in 23 layers, offload-attention in 9 layers"),
])  # fmt: skip
def test_llama_7b_on_small_cards(gib: int, batch: int, tokens: int, said: str) -> None:
    policies = choose_policies(shape_of("7b"), TrainingMemory(batch, tokens, optimizer="adamw_8bit"), gib * GIB)
    assert policies is not None
    assert policies.describe() == said


def every_policy(shape: ModelShape, eighth: str) -> list[Policies]:
    """What a run may have, one by one: layers are computed again from the last one on."""
    layers, kinds = shape.num_layers, ("offload",) if eighth else ("offload-attention", "offload")
    rows = [(kept,) * layers for kept in ("keep", "selective")]
    rows += [("selective",) * n + (kind,) * (layers - n) for kind in kinds for n in range(layers)]
    found = [Policies(f"{weights}{eighth}", row, "device", graphs) for row in rows for weights in ("resident", "stream")
             for graphs in (False, True)]  # fmt: skip
    lean = [replace(each, embeddings="host") for each in found if len(set(each.activations)) == 1]
    return found + [each for each in lean if each.activations[0].startswith("offload")]


@pytest.mark.parametrize("eighth", ["", "-fp8"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 512), (1, 520), (1, 2048), (2, 2048), (4, 2048)])
def test_nothing_that_fits_is_faster(batch: int, tokens: int, eighth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from chulengo.model import plan_policies

    shape, settings = shape_of("7b"), TrainingMemory(batch, tokens, optimizer="adamw_8bit")
    all_of_them = [
        (predict_fast(shape, settings, each).device_bytes, predict_step(shape, settings, each, H200).seconds)
        for each in every_policy(shape, eighth)
    ]  # fmt: skip
    asked: list[Policies] = []

    def counted(shape: ModelShape, settings: TrainingMemory, policies: Policies) -> Any:
        asked.append(policies)
        return predict_fast(shape, settings, policies)

    monkeypatch.setattr(plan_policies, "predict_fast", counted)
    for gib in CARDS:
        best = min((seconds for size, seconds in all_of_them if size <= gib * GIB), default=None)
        if best is None:
            continue
        policies = choose_policies(shape, settings, gib * GIB, Wanted("fp8" if eighth else "auto"))
        assert policies is not None
        assert predict_step(shape, settings, policies, H200).seconds == best
    assert len(asked) <= 200 * len(CARDS)


def test_a_graph_is_worth_the_slack() -> None:
    """It has the gradients twice here, and without it a step of 512 tokens takes four times as long."""
    shape, settings = shape_of("7b"), TrainingMemory(1, 512, gradient_accumulation=4, optimizer="adamw_8bit")
    for tenths, graphs, tight in ((51, False, True), (53, True, True), (55, True, True), (61, True, False)):
        policies = choose_policies(shape, settings, tenths * GIB // 10)
        assert policies is not None
        assert policies.graphs == graphs
        plan = predict_fast(shape, settings, policies)
        assert needed_bytes(plan) <= tenths * GIB // 10
        assert (plan.device_bytes > tenths * GIB // 10) == tight
    plain = predict_fast(shape, settings, Policies("stream", ("offload",) * 32, "host"))
    assert plain.device_bytes <= 5.5 * GIB, "without a graph the slack would be there"
    assert choose_policies(shape, settings, 5 * GIB) is None


def test_resident_weights_are_worth_computing_some_layers_again() -> None:
    """At 512 tokens writing matrices from NF4 takes half of the step."""
    shape, settings = shape_of("7b"), TrainingMemory(1, 512, optimizer="adamw_8bit")
    found = choose_policies(shape, settings, 19 * GIB)
    assert found is not None
    assert (found.weights, found.activations[0]) == ("resident", "selective")
    assert found.activations[-1].startswith("offload")
    assert predict_step(shape, settings, found, H200).tokens_per_s > 13_900
    in_fp8 = choose_policies(shape, settings, 16 * GIB, Wanted("fp8"))
    assert in_fp8 is not None
    assert in_fp8.weights == "resident-fp8"
    assert predict_step(shape, settings, in_fp8, H200).tokens_per_s > 26_000


def test_the_host_has_to_have_room() -> None:
    shape, settings = shape_of("7b"), TrainingMemory(4, 2048, optimizer="adamw_8bit")
    moved = pinned_bytes(shape, settings, Policies("stream", ("offload-attention",) * 32))
    assert moved == 32 * 8192 * (3 * 4096 * 2 + 32 * 4)  # two streams, attention's output, a float32 a head
    wider = shape_of("13b")  # 5,120 wide, where 80 MB take 128; 40 float32 where 1.25 MB take 2
    each = [1 << 27] * 3 + [1 << 21]
    assert pinned_bytes(wider, settings, Policies("stream", ("offload-attention",) * 40)) == 40 * sum(each)
    more, less = "offload-attention", "offload"
    for host_bytes, policy in ((None, more), (2 * moved, more), (2 * moved - 1, less)):
        found = choose_policies(shape, settings, 8 * GIB, host_bytes=host_bytes)
        assert found is not None
        assert found.activations[-31:] == (policy,) * 31
        plan = predict_fast(shape, settings, found)
        assert plan.host_bytes == pinned_bytes(shape, settings, found) > 0
        assert "of the host's memory, pinned" in plan.notes[0]
    assert predict_fast(shape, settings, Policies("stream", ("full",) * 32)).notes == ()
    wanted = Wanted(activations="offload-attention")  # who insists has it
    found = choose_policies(shape, settings, 8 * GIB, wanted, host_bytes=0)
    assert found is not None
    assert found.activations == ("offload-attention",) * 32
    config = config_of("7b")
    for host_bytes, policy in ((None, "offload-attention"), (GIB, "offload")):
        device = DeviceMemory("GPU", "cuda", 8 * GIB, 8 * GIB, host_bytes=host_bytes)
        assert set(plan_run(config, settings, device).policies.activations[1:]) == {policy}
    in_fp8 = choose_policies(shape, settings, 8 * GIB, Wanted("fp8"))
    assert in_fp8 is not None
    assert set(in_fp8.activations) == {"offload"}


def test_gradients_of_a_graph_are_there_twice_where_others_are_added() -> None:
    shape, policies = shape_of("7b"), Policies("stream", ("offload",) * 32, graphs=True)
    one, several = (
        predict_fast(shape, TrainingMemory(1, 512, gradient_accumulation=number), policies) for number in (1, 2)
    )
    assert several.parts["gradients"] == 2 * one.parts["gradients"] == 8 * one.num_trainable


def test_waiting_for_the_host() -> None:
    """A slow bus is waited for, and only for what is beyond the forward."""
    shape, settings = shape_of("7b"), TrainingMemory(4, 2048, optimizer="adamw_8bit")
    less, more = (Policies("stream", (policy,) * 32) for policy in ("offload", "offload-attention"))
    waiting = "waiting for the host's memory"
    slow = replace(H200, bus_bytes=H200.bus_bytes / 4)
    assert predict_step(shape, settings, less, H200).parts[waiting] == 0
    assert predict_step(shape, settings, more, H200).seconds < predict_step(shape, settings, less, H200).seconds
    assert predict_step(shape, settings, more, slow).seconds > predict_step(shape, settings, less, slow).seconds
    assert predict_step(shape, settings, Policies("stream", ("full",) * 32), slow).parts[waiting] == 0


def test_what_was_asked_for_is_kept() -> None:
    shape, settings = shape_of("7b"), TrainingMemory(1, 1024)
    for wanted in (
        Wanted(weights="stream"), Wanted(weights="resident"), Wanted(activations="full"), Wanted(embeddings="host"),
        Wanted(graphs="never"), Wanted("resident", "offload", "host", "always"),
    ):  # fmt: skip
        policies = choose_policies(shape, settings, 80 * GIB, wanted)
        assert policies is not None
        assert wanted.weights in ("auto", policies.weights)
        assert wanted.activations in ("auto", *set(policies.activations))
        assert wanted.embeddings in ("auto", policies.embeddings)
        assert wanted.graphs in ("auto", "always" if policies.graphs else "never")
    assert choose_policies(shape, settings, 12 * GIB, Wanted(weights="resident")) is None


def test_recomputing_is_recomputing() -> None:
    settings = TrainingMemory(4, 2048, gradient_checkpointing=True)
    for gib in (8, 16, 80):
        policies = choose_policies(shape_of("7b"), settings, gib * GIB)
        assert policies is not None
        assert set(policies.activations) <= {"full", "offload-attention"}


def test_graphs_where_the_host_would_take_longer() -> None:
    def graphs(**changes: Any) -> bool:
        policies = choose_policies(shape_of("7b"), TrainingMemory(**({"batch_size": 1, "row_tokens": 2048} | changes)),
                                   139 * GIB)  # fmt: skip
        assert policies is not None
        return policies.graphs

    assert graphs()
    assert graphs(dropout=0.1)
    assert not graphs(batch_size=4)
    # more is launched and less is computed where layers are computed again in FP8
    lean = choose_policies(shape_of("7b"), TrainingMemory(4, 2048, optimizer="adamw_8bit"), 8 * GIB, Wanted("fp8"))
    assert lean is not None
    assert lean.graphs
    # launches hide behind the work of a model that is large enough
    large = choose_policies(shape_of("70b"), TrainingMemory(1, 2048, optimizer="adamw_8bit"), 139 * GIB)
    assert large is not None
    assert not large.graphs


def test_room_for_the_longest_rows_and_speed_for_mean_ones() -> None:
    shape = shape_of("7b")
    for gib in (8, 24, 139):
        full, usual = (
            TrainingMemory(4, 2048, optimizer="adamw_8bit", mean_tokens=tokens) for tokens in (None, 440)
        )
        found, same = (choose_policies(shape, each, gib * GIB) for each in (usual, full))
        assert found is not None
        assert same is not None
        assert (found.graphs, same.graphs) == (True, False)
        assert predict_fast(shape, full, found).device_bytes <= gib * GIB
        seconds = [predict_step(shape, TrainingMemory(4, 440), each, H200).seconds for each in (found, same)]
        assert seconds[0] < 0.7 * seconds[1]
    longer = replace(full, mean_tokens=4096)  # of rows that are cut
    assert choose_policies(shape, longer, 24 * GIB) == choose_policies(shape, full, 24 * GIB)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 520), (3, 300), (2, 256), (1, 1), (4, 1900), (3, 1500)])
def test_a_graphs_batch_is_planned_as_it_is_filled_up(batch: int, tokens: int) -> None:
    import torch

    from chulengo.model.packed_inputs import pack_batch
    from chulengo.model.step_graph import filled

    ids = torch.ones(batch, tokens, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    rows = pack_batch({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    full = len(filled(rows, 4096).ids_T)
    shape, activations = shape_of("7b"), ("offload-attention",) * 32
    graph, plain = (Policies("stream", activations, graphs=graphs) for graphs in (True, False))
    whole, own = TrainingMemory(1, full), TrainingMemory(batch, tokens)
    assert predict_fast(shape, own, graph).peak_bytes == predict_fast(shape, whole, plain).peak_bytes
    assert pinned_bytes(shape, own, graph) == pinned_bytes(shape, whole, plain)
    step = predict_step(shape, own, graph, H200)
    # what is filled up takes time, and is no training
    assert step.parts["products"] == predict_step(shape, whole, graph, H200).parts["products"]
    assert step.tokens_per_s == pytest.approx(batch * tokens / step.seconds)
    assert predict_fast(shape, own, plain).peak_bytes <= predict_fast(shape, own, graph).peak_bytes


def test_graphs_have_room_beside_the_tensors_and_a_run_starts_without() -> None:
    shape, graph = shape_of("7b"), Policies("stream", ("offload",) * 32, graphs=True)
    for tokens, by_length, packed in ((512, 8, 8), (2048, 32, 20), (8192, 32, 20)):
        varied, full = (TrainingMemory(1, tokens, mean_tokens=mean) for mean in (tokens // 4, None))
        assert [graphs_of(each, graph) for each in (varied, full)] == [by_length, packed]
        assert graphs_of(varied, replace(graph, graphs=False)) == 0
        plan, plain = (predict_fast(shape, varied, each) for each in (graph, replace(graph, graphs=False)))
        assert plan.beside["CUDA graphs"] == by_length * (8 << 20)
        assert plan.device_bytes - plain.device_bytes == by_length * (8 << 20)
        assert needed_bytes(plan) == needed_bytes(plain)


def test_what_a_graph_is_filled_up_with_has_to_fit() -> None:
    shape, settings = shape_of("7b"), TrainingMemory(1, 520)
    policies = choose_policies(shape, settings, 8 * GIB)
    assert policies is not None
    kept = Policies("stream", ("keep",) * 32, graphs=True)
    assert predict_fast(shape, settings, kept).device_bytes > 8 * GIB, "768 tokens"
    assert predict_fast(shape, TrainingMemory(1, 512), kept).device_bytes <= 8.6 * GIB
    assert predict_fast(shape, settings, policies).device_bytes <= 8 * GIB


def test_dropout_takes_memory() -> None:
    shape, policies = shape_of("7b"), Policies("stream", ("offload",) * 32)
    peaks = [predict_fast(shape, TrainingMemory(4, 2048, dropout=p), policies).peak_bytes for p in (0.0, 0.1)]
    assert peaks[1] - peaks[0] == 8192 * 11008 * 2  # by count, see `linear_group.dropped_input`
    times = [predict_step(shape, TrainingMemory(4, 2048, dropout=p), policies, H200).seconds for p in (0.0, 0.1)]
    assert 1.05 < times[1] / times[0] < 1.3


def test_dora_takes_memory_and_time() -> None:
    shape, targets = shape_of("7b"), 32 * (4 * 4096 + 2 * 11008 + 4096)
    for policy, kept in (("keep", 4), ("selective", 4), ("full", 0)):
        policies = Policies("stream", (policy,) * 32)
        plain, dora = (predict_fast(shape, TrainingMemory(4, 2048, rank=16, dora=x), policies) for x in (False, True))
        parts = {name: size - plain.parts[name] for name, size in dora.parts.items()}
        assert parts["kept by the layers"] == 32 * 8192 * 4096 * 2 * kept  # q, k, o and down, by count
        assert dora.num_trainable - plain.num_trainable == targets
        # m with its gradient and states; its copy, g, and a second B in 16 bits
        assert parts["adapter and its copies"] == targets * (4 + 2) + targets * (8 + 2 * 16)
        assert dora.peak_bytes > plain.peak_bytes
        slower = [
            predict_step(shape, TrainingMemory(4, 2048, dora=x, gradient_accumulation=2), policies, H200).seconds
            for x in (False, True)
        ]  # fmt: skip
        assert 1.005 < slower[1] / slower[0] < 1.2


def test_a_tied_table_stays_on_the_device() -> None:
    shape = read_shape(config_of("7b") | {"tie_word_embeddings": True})
    assert shape is not None
    found = [choose_policies(shape, TrainingMemory(1, 512), gib * GIB // 8) for gib in range(20, 80)]
    assert {policies.embeddings for policies in found if policies is not None} == {"device"}


def test_the_way_out_fits() -> None:
    config, settings = config_of("7b"), TrainingMemory(4, 2048)
    small = DeviceMemory("Small GPU", "cuda", 6 * GIB, 6 * GIB)
    found = plan_run(config, settings, small)
    with pytest.raises(DoesNotFitError) as caught:
        check_room(config, settings, small, found)
    assert "Small GPU has 6.00 GiB free" in str(caught.value)
    assert "--set training.batch_size=2 --set training.gradient_accumulation=2" in str(caught.value)
    changed = changed_memory(settings, {"training.batch_size": 2, "training.gradient_accumulation": 2})
    check_room(config, changed, small, plan_run(config, changed, small))
    assert smallest_run_change(config, settings, DeviceMemory("Tiny", "cuda", GIB, GIB)) is None
    # nothing that is learned changes where policies suffice, and only as many of them as it takes
    card = DeviceMemory("GPU", "cuda", 16 * GIB, 16 * GIB)
    for wanted, overrides in (
        (Wanted(activations="keep"), ("model.activations_policy=auto",)),
        (
            Wanted(weights="resident", activations="keep"),
            ("model.weights_policy=auto", "model.activations_policy=auto"),
        ),
        (Wanted(weights="resident", graphs="never"), ("model.weights_policy=auto",)),
    ):  # fmt: skip
        change = smallest_run_change(config, settings, card, wanted)
        assert change is not None
        assert change[0] == overrides


@pytest.mark.parametrize(("gib", "settings", "said"), [
    (8, TrainingMemory(16, 2048, gradient_accumulation=2), "training.batch_size=4 training.gradient_accumulation=8"),
    (6, TrainingMemory(6, 1024), "training.batch_size=3 training.gradient_accumulation=2"),
    (8, TrainingMemory(4, 2048, rank=512),
     "training.batch_size=2 training.gradient_accumulation=2 lora.rank=64"),
    (8, TrainingMemory(1, 256, rank=512, optimizer="adamw_8bit"), "lora.rank=64"),
])  # fmt: skip
def test_no_more_is_changed_than_has_to_be(gib: int, settings: TrainingMemory, said: str) -> None:
    card = DeviceMemory("GPU", "cuda", gib * GIB, gib * GIB)
    change = smallest_run_change(config_of("7b"), settings, card)
    assert change is not None
    assert " ".join(change[0]) == said
    assert needed_bytes(change[1]) <= gib * GIB


def test_resident_matrices_are_counted_on_a_cpu() -> None:
    config, matrices = config_of("7b"), 4 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    settings = TrainingMemory(1, 512, device="cpu", compute_dtype="float32", autocast=False)
    for gib, weights, kept in ((22, "stream", "keep"), (60, "resident", "keep")):
        cpu = DeviceMemory("CPU", "cpu", gib * GIB, gib * GIB)
        found = plan_run(config, settings, cpu)
        assert (found.policies.weights, found.policies.activations[0]) == (weights, kept)
    assert found.plan.parts["matrices"] == matrices
    small = DeviceMemory("CPU", "cpu", 22 * GIB, 22 * GIB)
    found = plan_run(config, settings, small, Wanted("resident"))
    assert needed_bytes(found.plan) > matrices > 24 * GIB
    with pytest.raises(DoesNotFitError, match=r"matrices 24\.12 GiB") as caught:
        check_room(config, settings, small, found, Wanted("resident"))
    assert "--set model.weights_policy=auto" in str(caught.value)
    eighth = plan_run(config, settings, small, Wanted("resident-fp8"))
    assert eighth.plan.parts["matrices"] == matrices // 2


def test_a_cpu_goes_by_the_reference_engines_plan() -> None:
    config = config_of("7b")
    settings = TrainingMemory(1, 512, device="cpu", compute_dtype="float32", autocast=False)
    plenty, little = (DeviceMemory("CPU", "cpu", gib * GIB, gib * GIB) for gib in (200, 8))
    assert plan_run(config, settings, plenty).policies == Policies("resident", ("keep",) * 32)
    lean = plan_run(config, settings, little)
    assert lean.policies == Policies("stream", ("full",) * 32)
    assert lean.plan.device == "cpu"


class TestFP8:
    """Products in FP8 are the user's choice; where their copies are is the plan's, which knows their size and speed."""

    def test_never_by_itself(self) -> None:
        for gib in CARDS:
            policies = choose_policies(shape_of("7b"), TrainingMemory(4, 2048), gib * GIB)
            assert policies is None or not policies.fp8

    @pytest.mark.parametrize(("gib", "weights"), [(139, "resident-fp8"), (44, "resident-fp8"), (8, "stream-fp8")])
    def test_copies_are_kept_where_they_fit(self, gib: int, weights: str) -> None:
        settings = TrainingMemory(4, 2048, optimizer="adamw_8bit")
        policies = choose_policies(shape_of("7b"), settings, gib * GIB, Wanted("fp8"))
        assert policies is not None
        assert policies.weights == weights

    def test_kept_copies_take_the_place_of_nf4(self) -> None:
        shape, settings, keep = shape_of("7b"), TrainingMemory(1, 2048), ("keep",) * 32
        parts = {name: predict_fast(shape, settings, Policies(name, keep)).parts for name in ("resident-fp8", "stream")}
        assert "quantised weights" not in parts["resident-fp8"]
        # two copies of a byte a weight, and 128 columns a row: 2.9 % of these rows
        linear = shape.num_layers * shape.layer_linear_weights
        assert parts["resident-fp8"]["matrices"] == pytest.approx(2 * linear, rel=0.04)
        assert parts["resident-fp8"]["matrices"] > 2 * linear

    def test_copies_take_the_place_of_16_bit_weights_too(self) -> None:
        shape, keep = shape_of("7b"), ("keep",) * 32
        plain, nf4 = (predict_fast(shape, TrainingMemory(1, 2048, quantization=each), Policies("resident-fp8", keep))
                      for each in ("none", "nf4"))  # fmt: skip
        assert plain.peak_bytes == nf4.peak_bytes
        assert not {"weights", "quantised weights"} & {*plain.parts, *nf4.parts}

    def test_weights_that_are_not_quantised_are_their_own_matrices_with_dropout(self) -> None:
        shape, keep = shape_of("7b"), ("keep",) * 32
        for name in ("stream", "resident"):
            separate, folded = (
                predict_fast(shape, TrainingMemory(1, 2048, quantization="none", dropout=p), Policies(name, keep)).parts
                for p in (0.1, 0.0)
            )
            assert separate["matrices"] == 0 < folded["matrices"]
            assert separate["weights"] == folded["weights"]
            separate_step = predict_step(
                shape, TrainingMemory(1, 2048, quantization="none", dropout=0.1), Policies(name, keep), H200
            )
            assert separate_step.parts["dequantisation"] == 0

    def test_gradients_of_gate_and_up_are_there_in_a_byte_too(self) -> None:
        shape, settings, full = shape_of("7b"), TrainingMemory(4, 2048), ("full",) * 32
        eighth, plain = (predict_fast(shape, settings, Policies(w, full)).parts for w in ("stream-fp8", "stream"))
        assert eighth["one layer's backward"] - plain["one layer's backward"] == 8192 * 2 * 11008
        # the larger of gate and up's two copies, with 128 columns, instead of their matrix in 16 bits
        assert (eighth["matrices"], plain["matrices"]) == (22016 * (4096 + 128), 2 * 22016 * 4096)

    def test_a_wish_is_freed_when_nothing_fits(self) -> None:
        settings = TrainingMemory(4, 2048, optimizer="adamw_8bit")
        change = smallest_run_change(config_of("7b"), settings, DeviceMemory("a card", "cuda", 9 * GIB, 9 * GIB),
                                     Wanted("resident-fp8"))  # fmt: skip
        assert change is not None
        assert change[0] == ("model.weights_policy=fp8",), "another arithmetic is not the plan's to advise"
