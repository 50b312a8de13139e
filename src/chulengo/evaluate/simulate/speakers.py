"""Client and agent as two sides of one loaded base: the base is held once, and adapters are switched between turns.

The agent is the session (base and adapter, checked against each other there). The client is the bare base (the
agent's adapter switched off), the agent's own model, or a second adapter of the same base. A second adapter is checked
as the first is: its base record must name the same weights, its file must fill every place, and it speaks in the chat
style it was trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chulengo.data.renderer import RENDERER_FILE, Renderer, load_renderer
from chulengo.data.types import Message
from chulengo.errors import ModelError
from chulengo.evaluate.simulate.talk import Speaker
from chulengo.generate.engine import Answer, chat_prompt, complete_all
from chulengo.generate.settings import GenerationSettings
from chulengo.model.base_record import BaseRecord, load_base_record
from chulengo.model.session import Session, adapter_folder

BASE, AGENT = "base", "agent"
_CLIENT = "client"  # PEFT's name of the second adapter; the first is its `default`


@dataclass(frozen=True, slots=True)
class Voice:
    """One side of the base.

    Attributes:
        use: gives the model as this side inside the block.
        renderer: the chat style it was trained in.
        adapter: its adapter's folder, or None.
        notes: what was decided without being asked for.
    """

    use: Callable[[], AbstractContextManager[Any]]
    renderer: Renderer
    adapter: Path | None
    notes: tuple[str, ...] = ()

    def speaker(self, settings: GenerationSettings, batch_size: int) -> Speaker:
        """Returns the function that answers conversations as this side."""

        def speak(conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
            prompts = [chat_prompt(self.renderer, messages) for messages in conversations]
            with self.use() as model:
                return complete_all(model, prompts, settings, batch_size, seeds)

        return speak


def agent_and_client(session: Session, client: str) -> tuple[Voice, Voice]:
    """Returns the two sides.

    Args:
        session: base and the agent's adapter, if it has one; opened with `adds_adapter` where the client has its own.
        client: `base`, `agent` (the same model as the agent), or an adapter's folder.

    Raises:
        ModelError: no such adapter, or one of another base.
        RenderError: the adapter's chat style cannot be had with this tokenizer.
    """
    agent = Voice(lambda: session.side("tuned"), session.renderer, session.adapter)
    if client == AGENT:
        return agent, agent
    if client == BASE:
        return agent, Voice(lambda: session.side("base"), session.renderer, None)
    assert session.engine == "reference", "a session opened with adds_adapter"
    folder = adapter_folder(client, "--client")
    record = load_base_record(folder)
    _check_base(session, record, folder)
    notes = []
    if record.quantization is not None and record.quantization != session.quantization:
        notes.append(f"the client's adapter was trained on {record.quantization} weights; here they are "
                     f"{session.quantization}")
    renderer = _renderer(session, folder, notes)
    model = _with_adapter(session, folder)
    if session.has_adapter:
        return agent, Voice(lambda: _switched(model), renderer, folder, tuple(notes))
    # PEFT has put the adapter's matrices into the base's own modules: the agent is the base with them switched off
    return (
        Voice(lambda: _switched_off(model), session.renderer, None),
        Voice(lambda: _as_is(model), renderer, folder, tuple(notes)),
    )


@contextmanager
def _switched(model: Any) -> Iterator[Any]:
    model.set_adapter(_CLIENT, inference_mode=True)
    try:
        yield model
    finally:
        model.set_adapter("default", inference_mode=True)


@contextmanager
def _switched_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


@contextmanager
def _as_is(model: Any) -> Iterator[Any]:
    yield model


def _with_adapter(session: Session, folder: Path) -> Any:
    from chulengo.model.adapter import load_adapter
    from chulengo.model.load import quiet_libraries

    if not session.has_adapter:
        model = load_adapter(session.model, folder)
        _check_places(model, folder, "default")
        return model
    try:
        with quiet_libraries():
            session.model.load_adapter(str(folder), adapter_name=_CLIENT, is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"The client's adapter {folder} cannot be put beside the agent's: {str(error).splitlines()[0][:300]}",
            next_step="give an adapter of the same base",
        ) from error
    session.model.set_adapter("default", inference_mode=True)
    session.model.eval()
    _check_places(session.model, folder, _CLIENT)
    return session.model


def _check_places(model: Any, folder: Path, name: str) -> None:
    import peft
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        written = set(file.keys())
    placed = set(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    missing = {key for key in placed - written if "lora_" in key}
    if missing or written - placed:
        raise ModelError(
            f"The client's adapter {folder} was not made for this base: {len(written - placed)} of its tensors have no "
            f"place there and {len(missing)} places have no tensor.",
            next_step="give an adapter of the same base",
        )


def _check_base(session: Session, record: BaseRecord, folder: Path) -> None:
    own = BaseRecord() if session.adapter is None else load_base_record(session.adapter)
    theirs = record.weights_hash
    if theirs is None:
        return
    ours = own.weights_hash
    if ours is None:
        from chulengo.model.folder import resolve_model, weights_hash

        ours = weights_hash(resolve_model(session.model_name, offline=True))
    if ours != theirs:
        raise ModelError(
            f"The client's adapter {folder} was trained on {record.name}, whose weights are not those of the agent's "
            f"base {session.model_name}.",
            allowed="two adapters of one base, which is loaded once",
            next_step="--client base, or an adapter of the same base",
        )


def _renderer(session: Session, folder: Path, notes: list[str]) -> Renderer:
    if (folder / RENDERER_FILE).is_file():
        return load_renderer(folder, session.tokenizer)
    notes.append(f"the client's adapter has no {RENDERER_FILE}: it speaks in the agent's chat style")
    return session.renderer
