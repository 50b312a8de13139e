"""`chulengo report` as a user types it: what the page holds, what it must never hold, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import report_kit as kit
from chulengo.cli.main import main
from command_kit import Capture, refused

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "rect", "path"}
# what may stand in the page at all: nothing that loads, runs or submits
ALLOWED_TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "article", "div", "p", "span",
    "a", "b", "small", "bdi", "code", "pre", "h1", "h2", "h3", "h4", "h5", "ul", "ol", "li", "dl", "dt", "dd",
    "details", "summary", "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "figure", "figcaption",
    "svg", "line", "text", "path", "rect", "circle",
}  # fmt: skip


class Page(HTMLParser):
    """The page's elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.text.append(data)

    @property
    def words(self) -> str:
        """All text that is shown, white space put together."""
        return " ".join(" ".join(self.text).split())

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.elements)


def report(*words: object, out: Path) -> Page:
    assert main(["report", *map(str, words), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.write_run(tmp_path_factory.mktemp("report") / "support")


@pytest.fixture(scope="module")
def squad(run: Path) -> Path:
    return kit.write_results(run.parent / "squad", run=run)


@pytest.fixture(scope="module")
def hostile(run: Path) -> Path:
    kit.write(run.parent / "hostile" / "results.json", kit.hostile_results(run=run))
    return run.parent / "hostile"


def check_form(page: Page) -> None:
    """Checks what holds for every page: nothing from outside, nothing that runs, headings and tables in order."""
    assert {tag for tag, _ in page.elements} <= ALLOWED_TAGS
    assert next(attrs for tag, attrs in page.elements if tag == "html")["lang"] == "en"
    ids = [str(attrs["id"]) for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcset", "action", "style")]
        if "href" in attrs:
            assert tag == "a"
            assert str(attrs["href"]).removeprefix("#") in ids
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if tag == "svg" and attrs.get("role") == "img":
            assert attrs.get("aria-label")
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_run_with_results_has_every_part(run: Path, squad: Path, tmp_path: Path) -> None:
    page = report(run, "--results", squad, out=tmp_path / "r.html")
    check_form(page)
    words = page.words
    for part in ("nano, fine-tuned on talks.jsonl", "Better than the base on SQuAD F1.", "Scores: squad", "Training",
                 "Where it gained most", "Where the tuned model got worse", "Data: the supervision ledger",
                 "Answers, in words", "Cost", "1 h 24 min", "NVIDIA H200", "GPU-hours", "Settings", "lora.rank",
                 "Versions and hashes", "Do it again", "chulengo train --config PATH/support/config.yaml"):
        assert part in words, part
    results = json.loads((squad / "results.json").read_text("utf-8"))
    low, high = results["comparisons"][0]["interval_95"]
    assert f"interval of the difference +{low:.1f} to +{high:.1f}, over 120 items in 40 groups" in words
    assert "tokens that carry loss 30,120 30,120" in words


def test_nothing_comes_from_outside(run: Path, squad: Path, tmp_path: Path) -> None:
    report(run, "--results", squad, out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|javascript:", text, re.I)


def test_text_of_models_and_data_stays_text(run: Path, hostile: Path, tmp_path: Path) -> None:
    page = report(run, "--results", hostile, out=tmp_path / "r.html")
    check_form(page)
    assert page.count("style") == 1
    for text in kit.HOSTILE[:6]:
        assert text in "".join(page.text), text
    raw = (tmp_path / "r.html").read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", raw)
    assert "(empty answer)" in page.words
    assert "49" not in page.words.split("{{ 7 * 7 }}")[0][-5:]


def test_long_answers_are_folded(run: Path, hostile: Path, tmp_path: Path) -> None:
    page = report(run, "--results", hostile, out=tmp_path / "r.html")
    assert "all 10,000 characters" in page.words
    assert "word" * 2500 in "".join(page.text)
    assert any(tag == "details" and attrs.get("class") == "more" for tag, attrs in page.elements)


def test_same_input_same_bytes(run: Path, squad: Path, hostile: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        report(run, "--results", squad, hostile, "--markdown", tmp_path / f"{name}.md", out=tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()


@pytest.mark.parametrize("gone", ["ledger.json", "manifest.json", "metrics.jsonl", "result.json"])
def test_what_is_missing_is_said(gone: str, tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=20)
    (run / gone).unlink()
    page = report(run, out=tmp_path / "r.html")
    check_form(page)
    said = {"ledger.json": "No ledger.json in the run folder.", "manifest.json": "device not measured",
            "metrics.jsonl": "No loss was recorded.", "result.json": "This run is not finished."}
    assert said[gone] in page.words


def test_a_run_that_only_began(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", finished=False)
    for name in ("ledger.json", "manifest.json", "metrics.jsonl"):
        (run / name).unlink()
    page = report(run, out=tmp_path / "r.html")
    check_form(page)
    assert page.words.count("not measured") >= 9
    assert "nan" not in page.words.replace("nano", "")


def test_a_loss_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=20)
    row = {"kind": "train", "step": 21, "loss": "NaN", "grad_norm": "Infinity", "learning_rate": 1e-4}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    page = report(run, out=tmp_path / "r.html")
    assert "The loss is not finite from step 21 on." in page.words
    drawn = [value for tag, attrs in page.elements if tag in ("path", "line", "circle", "rect", "text")
             for name, value in attrs.items() if name != "class"]
    assert drawn
    assert not [value for value in drawn if re.search("nan|inf", str(value), re.I)]


def test_the_evaluation_is_done_again_as_it_was_typed(run: Path, squad: Path, tmp_path: Path) -> None:
    typed = ("--task squad --data PATH/dev-v1.1.json --set 'data.cleaning=[drop_long:500]' "
             "--out runs/again/results/squad")
    page = report(run, "--results", squad, out=tmp_path / "r.html")
    assert f"chulengo eval --adapter runs/again {typed}" in page.words
    assert "PATH stands for the folder in which that file or folder lies" in page.words
    content = json.loads((squad / "results.json").read_text("utf-8"))
    del content["command"]
    kit.write(tmp_path / "older" / "results.json", content)
    assert "chulengo eval" not in report(run, "--results", tmp_path / "older", out=tmp_path / "r.html").words


def test_commands_never_point_into_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kit.write_run(Path("runs/old"), steps=5, out="runs/old")
    typed = {
        "squad": "eval --adapter=runs/old --task squad --data dev.json --out runs/old/results/squad",
        "squad-500": "score --task squad --data dev.json --predictions runs/old/results/squad/predictions-tuned.jsonl "
                     f"--encoder {tmp_path}/encoder --compare-with {tmp_path}/runs/old/results/squad "
                     "--out runs/old/results/squad-500",
    }
    for name, words in typed.items():
        command = ["chulengo", *words.split()]
        kit.write_results(Path("runs/old/results") / name, run=Path("runs/old"), command=command)
    page = report("runs/old", "--markdown", "card.md", out=Path("r.html"))
    card = Path("card.md").read_text("utf-8")
    for line in (
        "chulengo train --config runs/old/config.yaml --out runs/again",
        "chulengo eval --adapter runs/again --task squad --data dev.json --out runs/again/results/squad",
        "chulengo score --task squad --data dev.json --predictions runs/again/results/squad/predictions-tuned.jsonl "
        "--encoder PATH/encoder --compare-with runs/again/results/squad --out runs/again/results/squad-2",
    ):
        assert line in page.words
        assert line in card
    alone = report("--results", "runs/old/results/squad", out=Path("r.html")).words
    assert "--data dev.json --out results/again/squad" in alone
    assert "PATH stands for" not in alone


def test_answers_of_two_evaluations_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = kit.results(items=120)
    for name, side in (("before", "base"), ("after", "tuned")):
        content = {key: value for key, value in whole.items() if key not in ("scores", "comparisons", "sides")}
        content |= {"sides": {"answers": {"predictions": f"{name}.json"}}, "scores": {"answers": whole["scores"][side]}}
        content["examples"] = [{**each, "answers": {"answers": each["answers"][side]}} for each in whole["examples"]]
        if name == "after":
            content["compared_with"] = {"results": "before", "comparisons": whole["comparisons"]}
        kit.write(tmp_path / name / "results.json", content)
    words = report("--results", "after", out=tmp_path / "r.html").words
    for part in ("Where it gained most", "against the answers in before.", "Where these answers are worse",
                 "of these answers among the rest"):
        assert part in words, part
    example = words[words.index("Where these answers are worse") :]
    assert re.search("before 100.0 Tafalla [0-9]+ these 0.0 It is", example)
    content = json.loads((tmp_path / "before" / "results.json").read_text("utf-8"))
    content["scores"]["answers"][0]["value"] += 1
    kit.write(tmp_path / "before" / "results.json", content)
    words = report("--results", "after", out=tmp_path / "r.html").words
    assert "Not side by side: the answers in before are gone, or are others now." in words
    assert "Where these answers are worse" not in words


def test_a_task_that_no_score_decides_is_one_for_rating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = kit.results(items=6) | {"task": "mt-bench", "headline": None, "comparisons": []}
    content["scores"] = {"base": [each for each in content["scores"]["base"] if each["name"] == "answer_words"]}
    kit.write(tmp_path / "mt" / "results.json", content)
    words = report("--results", "mt", "--markdown", "c.md", out=tmp_path / "r.html").words
    assert "Answers for rating; no score decides." in words
    assert "To have them rated: chulengo rate sheet --results mt --raters 3 --out study" in words
    assert "not compared" not in words.partition("Scores: mt-bench")[0]
    assert "**Answers for rating; no score decides.**" in (tmp_path / "c.md").read_text("utf-8")
    kit.write_results(tmp_path / "squad")
    words = report("--results", "mt", "squad", out=tmp_path / "r.html").words
    assert "Better than the base on SQuAD F1." in words  # a score says more than that there is none


def test_perplexity_is_said_to_be_of_the_expected_answer(tmp_path: Path) -> None:
    said = "It is the perplexity of the expected answer, not of the one that is shown."
    kit.write_results(tmp_path / "chat", headline="perplexity")
    assert said in report("--results", tmp_path / "chat", out=tmp_path / "r.html").words
    kit.write_results(tmp_path / "squad")
    assert said not in report("--results", tmp_path / "squad", out=tmp_path / "r.html").words


def test_examples_that_no_score_chose_say_so(tmp_path: Path) -> None:
    content = kit.results(items=6)
    for scores in content["scores"].values():
        for score in scores:
            score["items"] = []
    kit.write(tmp_path / "results" / "results.json", content)
    page = report("--results", tmp_path / "results", out=tmp_path / "r.html")
    assert "no score of single items chooses among them" in page.words
    assert "chosen by" not in page.words


def test_results_alone(squad: Path, tmp_path: Path) -> None:
    page = report("--results", squad, out=tmp_path / "r.html")
    check_form(page)
    assert "squad: support against nano" in page.words
    assert "Cost" not in page.words


def test_results_in_the_run_folder_are_found(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=12)
    kit.write_results(run / "results" / "squad", run=run)
    assert "Better than the base on SQuAD F1." in report(run, out=tmp_path / "r.html").words


def test_the_demos_scores_are_an_evaluation(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=12)
    items = [{"source": f"/data/heldout.jsonl:{n}", "question": f"What is {n}?", "accepted": [str(n)],
              "finish_reason": "stop"} for n in range(20)]
    kit.write(run / "scores.json", {
        side: {"name": "exact_match", "version": "exact-match/1", "definition": "Letter for letter.",
               "value": right / 20, "num_items": 20, "interval_95": [0.0, 1.0],
               "items": [item | {"answer": "x", "correct": n < right} for n, item in enumerate(items)]}
        for side, right in (("base", 2), ("tuned", 18))
    })
    page = report(run, out=tmp_path / "r.html")
    assert "Better than the base on exact match." in page.words
    assert "16 items better, 0 worse, 4 the same; McNemar p < 0.0001" in page.words
    assert re.search(r"What is \d+\? .* heldout.jsonl:\d+|heldout.jsonl:\d+ .* What is", page.words)
    assert "chulengo eval --adapter runs/again --data talks.jsonl --exact-match" in page.words
    assert "/data/" not in page.words


def test_search_and_sample_sizes(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=12)
    kit.write(run / "search" / "study.json", {"best": None, "trials": [
        {"number": n, "params": {"lora.rank": 8 * n}, "value": None if n == 1 else 2 - n / 10,
         "state": "pruned" if n == 1 else "complete", "steps": []} for n in range(4)]})
    kit.write(run / "search" / "curve.json", {"metric": "exact match", "unit": "share of answers", "points": [
        {"rows": rows, "value": value, "low": value - 0.1, "high": value + 0.1}
        for rows, value in ((1000, 0.5), (100, 0.25))], "verdict": {"text": "Yes: <b>more</b> helps."}})
    page = report(run, out=tmp_path / "r.html")
    check_form(page)
    assert "4 trials, 3 of them to the end." in page.words
    assert "trial validation loss lora.rank 3 1.700 24 2 1.800 16 0 2.000 0" in page.words
    assert "100 25.0\u202f% 15.0 to 35.0 1,000 50.0\u202f% 40.0 to 60.0" in page.words.replace(" % ", "\u202f% ")
    assert "Yes: <b>more</b> helps." in page.words


def test_the_card_is_markdown_that_runs_nothing(run: Path, squad: Path, hostile: Path, tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    report(run, "--results", squad, hostile, "--markdown", tmp_path / "c.md", out=tmp_path / "r.html")
    text = (tmp_path / "c.md").read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "tags": ["chulengo", "lora", "qlora"]}
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    tags = set(re.findall(r"<([a-z0-9]+)", html))
    assert tags <= {"h1", "h2", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "pre"}
    assert "<strong>Better than the base on SQuAD F1.</strong>" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<table>") == 6


def test_a_report_tells_no_folder_of_this_machine(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=5, out=str(tmp_path / "run"), data__train=str(tmp_path / "talks.jsonl"))
    kit.write_results(run / "results" / "squad", run=run)
    page = report(run, "--markdown", tmp_path / "c.md", out=tmp_path / "r.html")
    assert "nano, fine-tuned on talks.jsonl" in page.words
    for name in ("r.html", "c.md"):
        assert str(tmp_path) not in (tmp_path / name).read_text("utf-8")


def test_the_card_names_a_base_of_the_hub(tmp_path: Path) -> None:
    run = kit.write_run(tmp_path / "run", steps=5, model__name="meta-llama/Llama-2-7b-chat-hf")
    report(run, "--markdown", tmp_path / "c.md", out=tmp_path / "r.html")
    front = yaml.safe_load((tmp_path / "c.md").read_text("utf-8").split("---\n")[1])
    assert front["base_model"] == "meta-llama/Llama-2-7b-chat-hf"
    assert "license" not in front


def test_bad_input_is_refused(run: Path, squad: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ("--out", tmp_path / "r.html")
    unmade = tmp_path / "r.html"
    assert "Nothing to report on" in refused(capsys, "report", unmade=unmade)
    assert "does not exist" in refused(capsys, "report", tmp_path / "no", *out, unmade=unmade)
    assert "holds no run" in refused(capsys, "report", tmp_path, *out, unmade=unmade)
    assert f"--results {squad}" in refused(capsys, "report", squad, *out, unmade=unmade)
    assert "There are no results in" in refused(capsys, "report", run, "--results", run, *out, unmade=unmade)
    assert "is a folder" in refused(capsys, "report", run, "--out", tmp_path)
    (tmp_path / "broken.json").write_text('{"format": ', "utf-8")
    assert "is broken" in refused(capsys, "report", run, "--results", tmp_path / "broken.json", *out, unmade=unmade)
    other = kit.write_run(tmp_path / "other", steps=5)
    said = refused(capsys, "report", other, "--results", squad, *out, unmade=unmade)
    assert "results of another run" in said
    assert str(run) in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "chulengo-results/9"}, "it says format 'chulengo-results/9'"),
        ({"format": None}, "does not say its format"),
        ({"scores": {}}, "has no scores"),
        ({"scores": {"base": [{"value": 1}]}}, "scores.base is not a list of scores"),
        ({"scores": {"base": "x"}}, "scores.base is not a list of scores"),
        ({"comparisons": [1]}, "comparisons is not a list of objects"),
        ({"comparisons": [{}]}, "a comparison has no name"),
        ({"examples": {"a": 1}}, "examples is not a list of objects"),
        ({"sides": [1]}, "sides is not an object"),
    ],
)  # fmt: skip
def test_results_of_another_form_are_refused(
    changes: dict[str, object], said: str, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "results"
    kit.write(folder / "results.json", {"format": "chulengo-results/1", "scores": {"base": [{"name": "x"}]}} | changes)
    assert said in refused(capsys, "report", run, "--results", folder, "--out", tmp_path / "r.html")


@pytest.mark.parametrize("name", ["ledger.json", "manifest.json", "result.json", "metrics.jsonl", "config.yaml"])
def test_a_broken_file_of_the_run_is_an_error(name: str, tmp_path: Path, capsys: Capture) -> None:
    run = kit.write_run(tmp_path / "run", steps=5)
    (run / name).write_text("{'a': [\n{\n", encoding="utf-8")
    assert name in refused(capsys, "report", run, "--out", tmp_path / "r.html", unmade=tmp_path / "r.html")


def test_odd_values_are_not_measured(run: Path, tmp_path: Path) -> None:
    """Numbers that are none, ids twice, answers of other types: shown as missing, never a traceback."""
    content = kit.results(run=run, items=12)
    for number, score in enumerate(content["scores"]["tuned"]):
        score |= [{"value": "high"}, {"interval_95": [3, 1]}, {"items": ["x", {}]}, {"unit": 7, "value": None}][number]
    content["scores"]["base"][3]["items"] = 7
    content["comparisons"][0] |= {"interval_95": "wide", "difference": None, "p_mcnemar": "small"}
    content["comparisons"][1] |= {"num_items": 1e400, "interval_95": [float("nan"), 2]}
    content["examples"][:3] = [{}, {"id": 5, "answers": 3}, {"id": 6, "references": "x", "answers": {"base": None}}]
    kit.write(tmp_path / "odd" / "results.json", content | {
        "settings": 3, "seconds": None, "data": "x.json", "versions": 1})
    run = kit.write_run(tmp_path / "support", steps=5)
    kit.write(run / "result.json", {"seconds": 5e-324, "tokens": 10**400, "steps": "many", "shape": 3})
    kit.write(run / "ledger.json", {"train": {"lengths": [1], "num_rows": "x"}, "load": {"unused_columns": 3}})
    kit.write(run / "manifest.json", {"devices": [1], "versions": 2, "cpu": None, "git": 1, "hashes": 0, "command": {}})
    kit.write(run / "search" / "study.json", {"trials": [{"state": "complete", "value": 1e308}, 4]})
    page = report(run, "--results", tmp_path / "odd", out=tmp_path / "r.html")
    check_form(page)
    assert "undefined" in page.words
    assert "not compared" in page.words
