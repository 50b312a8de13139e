"""Two adapters of one base: each side answers as if it had been loaded alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_models as tiny
from chulengo.data.types import Message
from chulengo.errors import ModelError, RenderError
from chulengo.evaluate.simulate.speakers import Voice, agent_and_client
from chulengo.generate.settings import GenerationSettings
from chulengo.model.session import Session, open_session

CHATS = [[Message("user", text)] for text in ("Hello", "Where do guanacos live?", "Who spits?")]
SETTINGS = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speakers")
    base = tiny.write_model_folder(root / "base")
    return {
        "base": base,
        "one": tiny.write_adapter(base, root / "one", seed=1),
        "two": tiny.write_adapter(base, root / "two", seed=2, style="guanaco"),
    }


def opened(folders: dict[str, Path], adapter: str | None, *, adds_adapter: bool = True) -> Session:
    given = None if adapter is None else str(folders[adapter])
    return open_session(
        str(folders["base"]), given, device="cpu", quantization="none", adds_adapter=adds_adapter
    )


def said(voice: Voice) -> list[str]:
    return [answer.text for answer in voice.speaker(SETTINGS, 2)(CHATS, [1, 2, 3])]


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for name in (None, "one", "two"):
        found[name] = said(agent_and_client(opened(folders, name, adds_adapter=False), "agent")[0])
    assert len({tuple(texts) for texts in found.values()}) == 3
    return found


@pytest.mark.parametrize("adds_adapter", [False, True])
def test_the_client_is_the_base(
    folders: dict[str, Path], alone: dict[Any, list[str]], adds_adapter: bool
) -> None:
    session = opened(folders, "one", adds_adapter=adds_adapter)
    assert session.engine == ("reference" if adds_adapter else "fast")
    agent, client = agent_and_client(session, "base")
    assert [said(client), said(agent), said(client)] == [alone[None], alone["one"], alone[None]]


def test_the_client_is_another_adapter(folders: dict[str, Path], alone: dict[Any, list[str]]) -> None:
    session = opened(folders, "one")
    agent, client = agent_and_client(session, str(folders["two"]))
    assert [said(agent), said(client), said(agent)] == [alone["one"], alone["two"], alone["one"]]
    assert (agent.renderer.style, client.renderer.style) == ("llama2", "guanaco")
    with session.side("base"), pytest.raises(ZeroDivisionError), client.use():
        raise ZeroDivisionError
    assert said(agent) == alone["one"]


def test_the_agent_is_the_base_and_the_client_an_adapter(
    folders: dict[str, Path], alone: dict[Any, list[str]]
) -> None:
    agent, client = agent_and_client(opened(folders, None), str(folders["two"]))
    assert [said(agent), said(client), said(agent)] == [alone[None], alone["two"], alone[None]]


def test_an_adapter_of_another_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from chulengo.model.base_record import BaseRecord, save_base_record
    from chulengo.model.folder import weights_hash

    other = tiny.write_model_folder(tmp_path / "other", num_hidden_layers=3)
    wrong = tiny.write_adapter(other, tmp_path / "wrong")
    with pytest.raises(ModelError, match="was not made for this base"):
        agent_and_client(opened(folders, "one"), str(wrong))
    (wrong / "tokenizer.model").unlink()
    save_base_record(BaseRecord(name="other", weights_hash=weights_hash(other)), wrong)
    for agent in ("one", None):
        with pytest.raises(ModelError, match="weights are not those of the agent's base"):
            agent_and_client(opened(folders, agent), str(wrong))
    with pytest.raises(ModelError, match="no adapter folder"):
        agent_and_client(opened(folders, "one"), "missing")


def test_a_broken_renderer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folders["two"], broken)
    file = broken / "chulengo_renderer.json"
    file.write_text(file.read_text().replace('"guanaco"', '"plain"'))
    with pytest.raises(RenderError):
        agent_and_client(opened(folders, "one"), str(broken))
