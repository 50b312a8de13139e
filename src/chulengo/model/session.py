"""A model ready to answer: base, adapter, tokenizer and renderer that belong together, or a refusal.

`generate`, `chat` and `eval` open their model here and nowhere else, so that what is talked to is what was trained:

- The base is the one that the adapter's own record names, unless one is given. Where `chulengo_base.json` is with the
  adapter, the base's weights must have the hash recorded there: a folder of that name with other weights is refused.
- Without a word about it the base is held as in training (an adapter trained on NF4 weights corrects their rounding
  too); a base alone is not quantised.
- The renderer is the one saved with the adapter, verified on its golden conversations. Asking for another style is
  an error, not a preference.
- Every tensor of the adapter file must have found its place. PEFT itself leaves out what does not fit with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chulengo.data.renderer import RENDERER_FILE, Renderer, load_renderer
from chulengo.data.tokenizer import Tokenizer, load_tokenizer
from chulengo.data.wording import counted
from chulengo.errors import ModelError, RenderError, nearest
from chulengo.model.adapter import load_adapter
from chulengo.model.base_record import BASE_FILE, BaseRecord, load_base_record
from chulengo.model.cache_room import limit_cache
from chulengo.model.folder import (
    context_tokens,
    is_encoder_decoder,
    read_config,
    resolve_model,
    weights_hash,
)
from chulengo.model.inference import choose_engine, choose_weights, load_to_answer, trained_bytes, why_not_fast
from chulengo.model.load import load_base

DEFAULT_MODEL = "nano"


@dataclass(frozen=True, slots=True)
class Session:
    """What answers.

    Attributes:
        model: transformers model, a PeftModel around it, or the fast engine's, in evaluation mode on its device.
        tokenizer: text to ids.
        renderer: conversations to ids.
        model_name: the base as it was given or recorded.
        adapter: the adapter's folder, or None.
        quantization: nf4, fp4, int8 or none.
        context: most tokens of prompt and answer together; None: unlimited.
        engine: fast or reference.
        notes: what was decided without being asked for; to be shown.
    """

    model: Any
    tokenizer: Tokenizer
    renderer: Renderer
    model_name: str
    adapter: Path | None
    quantization: str
    context: int | None
    engine: str
    notes: tuple[str, ...] = ()

    @property
    def has_adapter(self) -> bool:
        """Whether there is a tuned side beside the base."""
        return self.adapter is not None

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder."""
        return bool(self.model.config.is_encoder_decoder)

    @contextmanager
    def side(self, name: str) -> Iterator[Any]:
        """Gives the model as `base` (its adapter switched off) or `tuned` inside the block."""
        off = name == "base" and self.has_adapter
        with self.model.disable_adapter() if off else nullcontext():
            yield self.model

    def describe(self) -> str:
        """Returns one line: what is loaded, and how."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        weights = dtype if self.quantization == "none" else f"{self.quantization}, {dtype}"
        parts = [f"{self.model_name} ({weights}, {self.model.device})"]
        if self.adapter is not None:
            parts.append(f"adapter {self.adapter}")
        parts.append(f"style {self.renderer.style}")
        if self.context is not None:
            parts.append(f"context {self.context:,} tokens")
        more = f", {self.model.describe()['weights'].partition(',')[0]} weights" if self.engine == "fast" else ""
        parts.append(f"engine {self.engine}{more}")
        return " · ".join(parts)


def open_session(
    model: str | None, adapter: str | None = None, *, revision: str | None = None,
    rendering: Mapping[str, Any] = MappingProxyType({}), quantization: str | None = None, double_quant: bool = True,
    compute_dtype: str = "auto", device: str = "auto", attention: str = "sdpa", offline: bool = False,
    engine: str = "auto", weights_policy: str = "auto", adds_adapter: bool = False,
) -> Session:
    """Returns base, adapter, tokenizer and renderer, loaded and checked against each other.

    Args:
        model: nano, a folder or a Hub name; None: the adapter's own base, or nano without one.
        adapter: a PEFT adapter's folder, or a run folder (its `adapter/` is meant).
        revision: Hub revision of the model.
        rendering: what was asked for of the renderer's settings (style, system, train_on, train_roles,
            train_end_of_turn); the rest is the adapter's, else the renderer's defaults.
        quantization: None: as the adapter was trained, else none.
        double_quant: only looked at when `quantization` is given.
        compute_dtype: see `model.load.load_base`.
        device: see `model.load.load_base`.
        attention: see `model.load.load_base`.
        offline: no network.
        engine: fast, reference, or auto: fast where it covers what is asked for.
        weights_policy: of the fast engine, for quantised weights: stream, resident, or auto, which those of training in
            FP8 mean here too.
        adds_adapter: the caller will put a further adapter on the base.

    Raises:
        ConfigError: the fast engine was asked for and does not cover this.
        ModelError: no such model or adapter, or they do not belong together.
        RenderError: the adapter was trained with another rendering than the one asked for.
    """
    folder = None if adapter is None else adapter_folder(adapter)
    record = BaseRecord() if folder is None else load_base_record(folder)
    notes: list[str] = []
    name = model or record.name or (DEFAULT_MODEL if folder is None else None)
    if name is None:
        raise ModelError(f"The adapter {folder} does not name its base model.", next_step="--model BASE")
    base = resolve_model(name, revision=revision or (record.revision if model is None else None), offline=offline)
    _check_base(base, name, folder, record, notes)
    if quantization is None:
        quantization, double_quant = record.quantization or "none", record.double_quant is not False
        if folder is not None and record.quantization is None:
            notes.append("how the adapter's base was quantised is not recorded: here it is not (see --quantization)")
    config = read_config(base)
    tokenizer = load_tokenizer(folder if folder is not None and _has_tokenizer(folder) else base)
    # before the weights, which take far longer to load
    renderer = _renderer(folder, tokenizer, config, rendering, notes)
    shared: dict[str, Any] = {"quantization": quantization, "compute_dtype": compute_dtype, "device": device}
    reason = None
    if engine != "reference":
        reason = why_not_fast(config, folder, **shared, attention=attention, adds_adapter=adds_adapter)
    engine, note = choose_engine(engine, reason)
    notes += [note] if note else []
    if weights_policy.endswith("fp8"):
        notes.append(f"model.weights_policy {weights_policy} is for training: answers are not computed in FP8")
    shared |= {"double_quant": double_quant, "name": name, "vocab_size": tokenizer.vocab_size}
    if engine == "fast":
        weights, note = choose_weights(
            weights_policy, config, folder, quantization=quantization, compute_dtype=compute_dtype, device=device
        )
        notes += [note] if note else []
        loaded = load_to_answer(base, folder, **shared, weights=weights)
        # weights held in another way than in training, as the user insists: what training took says nothing then
        insists = quantization != record.quantization or (weights_policy == "resident" and quantization != "none")
        note = limit_cache(loaded, None if insists else trained_bytes(folder))
        notes += [note] if note else []
    else:
        loaded = load_base(base, **shared, attention=attention)
        if folder is not None:
            loaded = load_adapter(loaded, folder)
            _check_adapter(loaded, folder, name)
    return Session(
        loaded, tokenizer, renderer, name, folder, quantization, context_tokens(config), engine, tuple(notes)
    )


def adapter_folder(given: str, option: str = "--adapter") -> Path:
    """Returns the folder of an adapter, given it or the run that made it.

    Args:
        given: path of either.
        option: where it was given, for what to type next.

    Raises:
        ModelError: there is no adapter.
    """
    path = Path(given).expanduser()
    folder = _adapter_in(path)
    if folder is not None:
        return folder
    if not path.is_dir():
        raise ModelError(
            f"There is no adapter folder {given!r}.",
            allowed="a run folder, or a folder with adapter_config.json and adapter_model.safetensors",
            next_step=_nearest_adapter(path, option),
        )
    if (path / "config.json").is_file():
        raise ModelError(f"{given} is a model, not an adapter.", next_step=f"--model {given}")
    if (path / "config.yaml").is_file():
        raise ModelError(
            f"The run {given} has no adapter yet: it has not ended.", next_step=f"chulengo train --resume {given}"
        )
    raise ModelError(
        f"{given} holds no adapter (no adapter_config.json).",
        allowed="a run folder, or a folder with adapter_config.json and adapter_model.safetensors",
        next_step=f"ls {given}",
    )


def _adapter_in(path: Path) -> Path | None:
    return next((each for each in (path, path / "adapter") if (each / "adapter_config.json").is_file()), None)


def _nearest_adapter(path: Path, option: str) -> str:
    parent = path.parent
    siblings = [each.name for each in parent.iterdir() if _adapter_in(each)] if parent.is_dir() else []
    close = nearest(path.name, siblings)
    return f"{option} {parent / close}" if close else f"{option} with a finished run   (ls runs)"


def _check_base(base: Path, name: str, folder: Path | None, record: BaseRecord, notes: list[str]) -> None:
    if folder is None:
        return
    if record.weights_hash is not None:
        if weights_hash(base) != record.weights_hash:
            raise ModelError(
                f"{name} is not the model that the adapter {folder} was trained on: the weights differ.",
                allowed=f"the weights of {record.name} as they were then (weights_hash in {BASE_FILE})",
            )
    elif record.name is not None and record.name != name:
        notes.append(f"the adapter was trained on {record.name}; that {name} has the same weights is not recorded")


def _check_adapter(model: Any, folder: Path, name: str) -> None:
    import peft
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        written = set(file.keys())
    placed = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    # a tied matrix trained in full is written under one of its two names
    missing = {key for key in placed - written if "lora_" in key}
    if missing or written - placed:
        raise ModelError(
            f"The adapter {folder} was not made for {name}: "
            f"{counted(len(written - placed), 'of its tensors has', 'of its tensors have')} no place there and "
            f"{counted(len(missing), 'place has', 'places have')} no tensor, such as "
            f"{sorted(missing | (written - placed))[0]}.",
            next_step="leave out --model, or give the base that the adapter was trained on",
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.model", "tokenizer.json", "spiece.model"))


def _renderer(
    folder: Path | None, tokenizer: Tokenizer, config: dict[str, Any], rendering: Mapping[str, Any], notes: list[str]
) -> Renderer:
    if folder is None or not (folder / RENDERER_FILE).is_file():
        if folder is not None:
            notes.append(f"the adapter has no {RENDERER_FILE}: whether it was trained with this chat style is unknown")
        return Renderer(
            tokenizer, model_type=str(config["model_type"]), encoder_decoder=is_encoder_decoder(config), **rendering
        )
    renderer = load_renderer(folder, tokenizer)
    saved = renderer.settings()
    for key, value in rendering.items():
        wanted = list(value) if isinstance(value, tuple) else value
        if wanted != saved[key] and (key, wanted) != ("style", "auto"):
            raise RenderError(
                f"The adapter {folder} was trained with prompt.{key} {saved[key]!r}, and {wanted!r} was asked for: it "
                "would read other tokens than in training.",
                next_step=f"leave out prompt.{key}, or train an adapter with it",
            )
    return renderer
