"""`chulengo simulate` as it is typed, with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chulengo.cli.main import main
from chulengo.data.load import load_examples

Capture = pytest.CaptureFixture[str]
SCENARIOS = """
scenarios:
  - id: name
    opening: What is the name of your company?
    met_when: {text: Tambo Trails}
  - {id: play, persona: A hiker., goal: Ask about llamas., client_stop: never said}
  - {id: lost, opening: [Hello!, Goodbye!], met_when: {text: it will not say this}}
"""
DIALOGUES = (
    "id,dialogue\n"
    "7, customer: What is the name of your company? support: Our company is called Tambo Trails. customer: Thanks! "
    "support: You are welcome.\n"
    "8, customer: Who are you? customer: Tell me. support: We are a help desk.\n"
)
FAST = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12")


@pytest.fixture
def scenarios(tmp_path: Path) -> Path:
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIOS)
    return file


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    file = tmp_path / "d.csv"
    file.write_text(DIALOGUES)
    return file


def simulate(*words: object) -> int:
    return main(["simulate", "--model", "nano", *FAST, *map(str, words)])


def test_scenarios_from_start_to_end(scenarios: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--scenarios", scenarios, "--repeats", 2, "--turns", 2, "--seed", 4]
    assert simulate(*words, "--batch-size", 8, "--out", tmp_path / "whole", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    scores = {score["name"]: score for score in results["scores"]["base"]}
    assert scores["goal_reached"]["num_items"] == 6
    assert [item["value"] for item in scores["goal_reached"]["items"]] == [1, 1, 0, 0, 0, 0]
    assert len(scores["goal_reached"]["interval_95"]) == 2
    assert scores["turns"]["version"] == "simulation_turns/1"
    assert results["command"][:4] == ["chulengo", "simulate", "--model", "nano"]
    assert {str(word) for word in words} <= set(results["command"])
    assert results["endings"] == {"goal": 2, "turns": 2, "script": 2}
    assert results["settings"]["agent_settings"]["seed"] == 4

    whole = (tmp_path / "whole" / "transcripts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == ["name", "name/2", "play", "play/2", "lost", "lost/2"]
    assert rows[2]["messages"] != rows[3]["messages"]
    page = (tmp_path / "whole" / "transcripts.html").read_text(encoding="utf-8")
    assert all(f"<b>{row['id']}</b>" in page for row in rows)
    examples, report = load_examples(str(tmp_path / "whole" / "transcripts.jsonl"))
    assert (report.format, len(examples)) == ("messages", 6)

    # stopped after two conversations and a half, and gone on with in other batches: the same file
    part = tmp_path / "part"
    part.mkdir()
    (part / "simulation.json").write_bytes((tmp_path / "whole" / "simulation.json").read_bytes())
    lines = whole.splitlines(keepends=True)
    (part / "transcripts.jsonl").write_text(lines[4] + lines[1] + lines[0][:50], encoding="utf-8")
    assert simulate(*words, "--batch-size", 1, "--out", part) == 0
    assert (part / "transcripts.jsonl").read_text(encoding="utf-8") == whole
    captured = capsys.readouterr()
    assert "2 of 6 conversations are there" in captured.err
    assert f"{part / 'transcripts.jsonl'}: 6 of 6\n" in captured.err
    assert "goal_reached" in captured.out
    assert simulate(*words, "--out", part, "--temperature", 0.1) == 2
    assert "other agent_settings, client_settings" in capsys.readouterr().err


def test_a_replay_is_compared_with_the_real_agent(dialogues: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("rouge_score")
    assert simulate("--replay", dialogues, "--temperature", 0, "--out", tmp_path / "o", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    scores = {score["name"]: score for score in results["scores"]["base"]}
    assert scores["token_f1"]["num_items"] == scores["rougeL"]["num_items"] == 3
    assert scores["token_f1"]["value"] > 0.2
    assert [example["references"] for example in results["examples"]] == [
        ["Our company is called Tambo Trails."], ["You are welcome."], ["We are a help desk."],
    ]
    assert results["examples"][2]["question"] == "Who are you?\nTell me."
    assert "We are a help desk." in (tmp_path / "o" / "transcripts.html").read_text(encoding="utf-8")


def test_dialogues_become_training_data_for_either_side(dialogues: Path, tmp_path: Path) -> None:
    assert main(["simulate", "--replay", str(dialogues), "--write-chats", str(tmp_path / "data")]) == 0
    agent, _ = load_examples(str(tmp_path / "data" / "agent.jsonl"))
    client, _ = load_examples(str(tmp_path / "data" / "client.jsonl"))
    assert [example.answer for example in agent] == ["You are welcome.", "We are a help desk."]
    assert [example.answer for example in client] == ["Thanks!", "Who are you?\nTell me."]
    assert [message.role for message in client[0].messages] == ["system", *["user", "assistant"] * 2]
    assert main(["simulate", "--replay", str(dialogues), "--write-chats", str(tmp_path / "data")]) == 2


def test_simulations_without_a_conversation_in_common_are_told_so(tmp_path: Path, capsys: Capture) -> None:
    for name in ("a", "b"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"scenarios:\n  - {{id: only-{name}, opening: Hello!}}\n")
        assert simulate("--scenarios", file, "--turns", 1, "--out", tmp_path / name) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "have no conversation in common" in said
    assert f"{tmp_path / 'a'} has only-a; {tmp_path / 'b'} has only-b." in said
    assert "try:     simulate both with the same --scenarios" in said


def test_two_simulations_are_compared_over_what_both_have(scenarios: Path, tmp_path: Path, capsys: Capture) -> None:
    short = SCENARIOS.replace("play, persona", "other, persona")  # a conversation of another name
    (tmp_path / "t.yaml").write_text(short)
    words = ["--turns", 2, "--seed", 4]
    # so few tokens that no goal is reached, and that a speaker of one turn has not said four words
    assert simulate(*words, "--scenarios", scenarios, "--out", tmp_path / "a") == 0
    assert simulate(*words, "--scenarios", tmp_path / "t.yaml", "--max-new-tokens", 2, "--out", tmp_path / "b") == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    out, said = capsys.readouterr()
    found = json.loads(out)
    by_name = {each["name"]: each for each in found["comparisons"]}
    assert by_name["goal_reached"]["num_items"] == by_name["turns"]["num_items"] == 2
    assert (by_name["goal_reached"]["base"], by_name["goal_reached"]["tuned"]) == (0.5, 0)  # name reached it, lost not
    assert "turns_to_goal" not in by_name
    assert f"note: only {tmp_path / 'a'} has turns_to_goal" in said
    assert (f"goal_reached, turns: compared without 1 conversation only in {tmp_path / 'a'} (play) and "
            f"1 conversation only in {tmp_path / 'b'} (other)") in said
    # what each score is of, without the command
    stored = [json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in "ab"]
    for score in stored[0]["scores"]["base"]:
        others = {each["name"]: each for each in stored[1]["scores"]["base"]}.get(score["name"], {"items": []})
        both = {item["id"] for item in score["items"]} & {item["id"] for item in others["items"]}
        assert (score["name"] in by_name) == bool(both)
        assert by_name.get(score["name"], {"num_items": 0})["num_items"] == len(both)
        if score["name"] == "agent_repetition":
            assert len(both) < len(score["items"]), "this one covers other conversations"
    # the same name for another scenario is another thing
    (tmp_path / "u.yaml").write_text(SCENARIOS.replace("llamas", "alpacas"))
    assert simulate(*words, "--scenarios", tmp_path / "u.yaml", "--out", tmp_path / "c") == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "of other scenarios in the two: play" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Neither --scenarios nor --replay"),
        (["--scenarios", "s.yaml", "--replay", "d.csv"], "Both --scenarios and --replay"),
        (["--scenarios", "s.yaml"], "No folder"),
        (["--scenarios", "t.yaml", "--out", "o"], "--scenarios s.yaml"),
        (["--scenarios", "s.yaml", "--out", "s.yaml"], "s.yaml"),
        (["--scenarios", "s.yaml", "--out", "o", "--turns", "0"], "--turns is 0"),
        (["--scenarios", "s.yaml", "--out", "o", "--num-rows", "5"], "--num-rows belongs to --replay"),
        (["--scenarios", "s.yaml", "--out", "o", "--repeats", "2", "--temperature", "0"], "again and again"),
        (["--scenarios", "s.yaml", "--out", "o", "--client-temperature", "-1"], "temperature is -1"),
        (["--scenarios", "s.yaml", "--out", "o", "--client", "missing"], "no adapter folder 'missing'"),
        (["--scenarios", "s.yaml", "--out", "o", "--client", "missing"], "try:     --client with a finished run"),
        (["--replay", "d.csv", "--out", "o", "--client", "agent"], "would never speak"),
        (["--replay", "missing.csv", "--out", "o"], "no file"),
        (["--replay", "d.csv", "--out", "o", "--style", "lama2"], "llama2"),
        (["--scenarios", "s.yaml", "--out", "o", "--tempreature", "1"], "--temperature"),
    ],
)
def test_mistakes_are_explained(
    scenarios: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
    words: list[str], says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert simulate(*words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "try:" in captured.err or "allowed: " in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "o" / "transcripts.jsonl").exists()
