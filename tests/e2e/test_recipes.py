"""Every recipe in its smallest form: its commands as the page prints them, from the data to the scores.

The commands run in this process, each through `main`: a process each would spend most of its time on imports.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
DEFINITIONS = sorted((ROOT / "recipes" / "pages").glob("*.yaml"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/recipe_run.py."""
    return load("recipe_run")


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.slow
@pytest.mark.parametrize("path", DEFINITIONS, ids=[path.stem for path in DEFINITIONS])
def test_smallest_form(
    path: Path, tool: ModuleType, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tool.encoder_folder()
    recipe = tool.load_recipe(path, "smallest", encoder=encoder is not None)
    absent = [name for name in recipe.needs if not (shared_data / name).exists()]
    if absent:
        pytest.skip(f"no {', '.join(absent)} among the shared data")
    folder, docs = tmp_path / "work", tmp_path / "docs"
    tool.prepare(recipe, folder, shared_data, encoder)
    monkeypatch.chdir(folder)
    ran = tool.run_steps(recipe, folder, tool.in_this_process)
    page = load("recipe_page").write_page(recipe, ran, folder, docs).read_text(encoding="utf-8")
    assert "## Before and after" in page
    assert ("Always answering '" in page) == (path.stem == "9_imdb")
    comparison, _ = load("recipe_page").headline_of(recipe, folder)
    assert comparison.interval_95 is not None
    for picture in re.findall(r"\]\((images/[^)]+)\)", page):
        assert (docs / picture).stat().st_size < 60_000


@pytest.mark.parametrize("path", DEFINITIONS, ids=[path.stem for path in DEFINITIONS])
def test_definition(path: Path, tool: ModuleType) -> None:
    from chulengo.cli.main import VERBS

    for size in tool.SIZES:
        for encoder in (True, False):
            recipe = tool.load_recipe(path, size, encoder=encoder)
            lines = [line for step in recipe.steps for line in step.commands]
            assert lines
            assert {line.split()[0] for line in lines} <= {*VERBS, "python"}
            assert not any("[[" in line or re.search(r"\{\w+\}", line) for line in lines)
            # without the package the optional metric is left out; nothing else may name it
            assert encoder or not any("--encoder" in line for line in lines)
    # what a run gives is never typed: it would stay when the run is another
    assert not re.search(r"\{\w+\}|\d\s?%", recipe.page["notes"])
    for line in recipe.page["gpu"]["commands"]:
        for config in re.findall(r"--config (\S+)", line):
            assert (ROOT / config).is_file(), config


@pytest.mark.parametrize("path", DEFINITIONS, ids=[path.stem for path in DEFINITIONS])
def test_page_is_there(path: Path) -> None:
    page = ROOT / "docs" / "recipes" / f"{path.stem.split('_', 1)[1]}.md"
    assert page.is_file(), f"make recipes ARGS={path.stem.split('_', 1)[0]}"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.stem.split('_', 1)[0]}. ")
    for part in (" on one GPU\n", "## What it took", "## Before and after", "(95 % interval)",
                 "## Plots", "## Sample answers", "## What it does not show", "Made by `make recipes"):
        assert part in text, part


@pytest.mark.parametrize("path", DEFINITIONS, ids=[path.stem for path in DEFINITIONS])
def test_page_says_of_the_large_model_what_its_definition_says(path: Path, tool: ModuleType) -> None:
    """Nothing of this part comes from a run, so it is kept up without one."""
    page = tool.load_recipe(path, "page", encoder=True).page
    text = (ROOT / "docs" / "recipes" / f"{path.stem.split('_', 1)[1]}.md").read_text(encoding="utf-8")
    assert "\n\n".join(load("recipe_page").large_form(page)) in text


def test_what_a_page_promises_of_the_large_model_its_commands_do(tool: ModuleType) -> None:
    said = {path.stem: tool.load_recipe(path, "page", encoder=True).page for path in DEFINITIONS}
    heads = {name: load("recipe_page").large_form(page)[0] for name, page in said.items()}
    assert heads["1_guanaco-chat"] == "## Llama-2-7b-chat on one GPU"
    assert heads["6_plain-text"] == "## Llama-2-7b on one GPU"
    assert heads["8_flan-t5"] == "## flan-t5-base on one GPU"
    # one repeat has no interval, and then there is no answer whether more data would help
    repeats = [int(found) for page in said.values() for line in page["gpu"]["commands"]
               for found in re.findall(r"--sample-sizes .*--repeats (\d+)", line)]
    assert repeats
    assert min(repeats) >= 3
    # dialogues are cleaned for a conversation as they are for training
    talks = [line for line in said["3_tweetsumm"]["gpu"]["commands"] if line.startswith("chulengo simulate")]
    assert len(talks) == 2
    assert len({re.search(r"--set data\.cleaning=(\S+)", line)[1] for line in talks}) == 1  # type: ignore[index]


def test_filled_in_commands(tool: ModuleType) -> None:
    line = "eval --num-rows {rows} [[ --encoder {encoder} ]] --set data.cleaning=[strip_urls,drop_long:{chars}]"
    values = {"rows": 5, "chars": 80, "encoder": "encoder"}
    assert tool.filled(line, values) == (
        "eval --num-rows 5 --encoder encoder --set data.cleaning=[strip_urls,drop_long:80]"
    )
    assert "--encoder" not in tool.filled(line, {**values, "encoder": None})
    with pytest.raises(tool.RecipeError, match="rows"):
        tool.filled(line, {"chars": 80})


def test_a_failing_command_ends_a_recipe(tool: ModuleType, tmp_path: Path) -> None:
    steps = tuple(tool.Step(name, "", (f"{name} x",), False, None) for name in ("first", "second", "third"))
    recipe = tool.Recipe("name", 1, "smallest", (), steps, {}, {})
    asked = []

    def runner(words: list[str], folder: Path, stop: object) -> tuple[int, str]:
        asked.append(words[0])
        return (2 if words[0] == "second" else 0), "what it printed"

    with pytest.raises(tool.RecipeError, match=r"second: status 2.*(?s:.*)what it printed"):
        tool.run_steps(recipe, tmp_path, runner, tell=lambda text: None)
    assert asked == ["first", "second"]
