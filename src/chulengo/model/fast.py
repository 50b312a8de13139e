"""`load_fast`: a folder to the fast engine's model, which takes batches and gives losses.

The counterpart of `model.load.load_base` and `model.adapter`, with the same meaning of every setting they share; what
it does not cover raises and names the reference engine. Nothing is chosen in silence: `describe` says what was.

A training step of the caller:

    nll, count = model.nll(batch)      # for each micro-batch
    (nll / count_of_the_step).backward()
    optimizer.step()                   # over model.trainable_parameters()

The products read copies of the adapter in the compute dtype, and resident folded matrices hold its change. `nll`
refreshes both at every call, since a change cannot be told from outside (optimisers that write through raw pointers
leave no trace); within one optimiser step the adapter does not change, so the second and later micro-batches may say
`refold=False`.

To answer and to be scored it has what the token engine and the scores ask of a model of either engine: `config`,
`device`, `dtype`, `eval`, `train`, `training`, `disable_adapter`; and `decoding` and `target_nll` of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chulengo.data.batches import IGNORE
from chulengo.errors import ConfigError, ModelError
from chulengo.kernels import ops
from chulengo.model import llama
from chulengo.model.allocator import OwnMemory
from chulengo.model.decode import FastDecoding, StepMemory
from chulengo.model.dora import check_norm
from chulengo.model.dropout import step_seed
from chulengo.model.flat_factors import FlatFactors
from chulengo.model.folder import read_config
from chulengo.model.linear_group import LoraForm, Matrices
from chulengo.model.llama_shape import LlamaShape, read_llama_shape, refuse, rope_tables
from chulengo.model.llama_weights import LlamaWeights, load_llama_weights
from chulengo.model.load import resolve_device, resolve_dtype
from chulengo.model.load_settings import layer_policies, quantizes
from chulengo.model.lora import (
    adapter_settings,
    attach_fresh,
    draw_fresh,
    lora_form,
    named_factors,
    read_adapter,
    write_adapter,
)
from chulengo.model.lora_settings import ALL_LINEAR, LoraSettings, lora_settings
from chulengo.model.offload import HostStates
from chulengo.model.packed_inputs import PackedInputs, pack_batch, pack_sequences
from chulengo.model.plan import device_memory
from chulengo.model.plan_policies import Wanted
from chulengo.model.policy_checks import check_policies
from chulengo.model.rehearsal import beside, compile_step, few_tokens
from chulengo.model.step_graph import RepeatedWork, StepGraphs, filled

TARGETS_AT_ONCE = 2048  # in `target_nll`: x 32,000 pieces x 4 bytes: 262 MB


@dataclass(frozen=True, slots=True)
class FastConfig:
    """What is asked of the `config` of a model of either engine, under transformers' names."""

    model_type: str
    max_position_embeddings: int
    is_encoder_decoder: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as a dictionary."""
        return asdict(self)


class FastModel:
    """A frozen decoder with one adapter or none. Made by `load_fast`."""

    def __init__(
        self, weights: LlamaWeights, shape: LlamaShape, matrices: Matrices, *, name: str, device: torch.device,
        activations: Sequence[str], backend: str, graphs: bool = False,
    ) -> None:
        self.weights, self.shape, self.name, self.device = weights, shape, name, device
        self.lora: LoraSettings | None = None
        self._flat: FlatFactors | None = None
        self._uses_graphs = graphs
        self._refreshing = RepeatedWork(lambda: self._matrices.refresh(self._groups))
        self._graphs: StepGraphs | None = None
        self._step_memory: StepMemory | None = None
        self._last_decoding: weakref.ref[FastDecoding] | None = None
        self.cache_tokens: int | None = None  # that answers may hold at once (`model.cache_room`); None: no limit
        self.training = False
        self.dropout_seed = 0
        self.micro_step = 0  # counts training calls of `nll`; a resumed run sets it, and gets the same masks
        self._matrices, self._backend = matrices, backend
        self._groups = list(weights.groups())
        self._activations = tuple(activations)
        self._host_states = HostStates(device) if any("offload" in each for each in activations) else None
        self._cos_SP, self._sin_SP = rope_tables(shape, device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self._matrices.dtype

    @property
    def config(self) -> FastConfig:
        """Architecture, and how long a sequence may be."""
        return FastConfig(self.shape.sizes.model_type, self.shape.max_seq_tokens)

    def attach_lora(
        self, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = (ALL_LINEAR,),
        rslora: bool = False, dora: bool = False, train_head: bool = False, train_embeddings: bool = False,
        seed: int = 0, form: str = "auto",
    ) -> None:
        """Gives the model a fresh adapter, the only trainable part; B is 0, so that it changes nothing yet.

        Args:
            rank: LoRA rank.
            alpha: scale; the update is multiplied by alpha / rank, or alpha / sqrt(rank) with `rslora`.
            dropout: of the adapter's input, while training.
            targets: names of linear maps, or `all-linear`.
            rslora: rank-stabilised scale.
            dora: a trained magnitude for each row of W + s B A; only folded, so not with dropout.
            train_head: not in this engine.
            train_embeddings: not in this engine.
            seed: of A and of the dropout masks; A is what PEFT makes of the same seed.
            form: folded, separate, or auto (folded without dropout; separate where products are in FP8).

        Raises:
            ConfigError: a setting that is out of range or not in this engine.
        """
        settings = lora_settings(
            rank=rank, alpha=alpha, dropout=dropout, targets=targets, rslora=rslora, dora=dora,
            train_head=train_head, train_embeddings=train_embeddings,
        )
        adapter_form = lora_form(settings, form, fp8=self._matrices.fp8 is not None)
        attach_fresh(self._groups, settings, device=self.device)
        self.dropout_seed, self.micro_step = seed, 0
        if settings.dora:
            self._begin_magnitudes()
        self._adapted(settings, adapter_form, lambda: draw_fresh(self._groups, seed))

    def load_adapter(self, folder: Path, *, trainable: bool = False, form: str = "auto") -> None:
        """Gives the model the adapter of a folder, in PEFT's files.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            trainable: train it further.
            form: folded, separate, or auto (folded without dropout).

        Raises:
            ModelError: no adapter, one of another model, or one with a part that this engine does not have.
        """
        settings = adapter_settings(folder)  # everything that may be refused, before a factor is changed
        if trainable and settings.dora and settings.dropout:
            raise refuse(f"The adapter in {folder} has DoRA with dropout {settings.dropout}.", allowed="dropout 0")
        adapter_form = lora_form(settings, form, fp8=self._matrices.fp8 is not None)
        read_adapter(self._groups, folder, device=self.device, trainable=trainable)
        self._adapted(settings, adapter_form)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter in PEFT's files, as `model.adapter.save_adapter` would."""
        if self.lora is None:
            raise ModelError("The model has no adapter to save.", next_step="attach_lora or load_adapter")
        write_adapter(self._groups, self.lora, folder, base_name=self.name)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the adapter's tensors under PEFT's names."""
        return named_factors(self._groups)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns what an optimiser is to change: one float32 tensor that all trainable factors are parts of, or none.

        `named_parameters` are its parts; their gradients are parts of its gradient.
        """
        return [] if self._flat is None else [self._flat.parameter]

    def trainable_names(self) -> list[str]:
        """Returns PEFT's names of the tensors that the trainable one consists of, in its order."""
        names = {id(value): name for name, value in self.named_parameters().items()}
        return [names[id(factor)] for factor in self._trained_factors()]

    def prepare(self) -> int:
        """Compiles the kernels of a training step, side by side, and changes nothing else; returns how many.

        A fresh adapter, or one that is to be trained further, has done it: the first step would compile them one after
        the other. Without a GPU, or in float32, for which there is no step on one, nothing is done.
        """
        if ops.choose(self.device, self._backend)[0] != "fused" or self.device.type != "cuda":
            return 0
        if self.dtype == torch.float32:
            return 0
        inputs = few_tokens(self.shape.max_seq_tokens)
        drops = self.lora is not None and self.lora.dropout
        seed_1 = step_seed(self.dropout_seed, 0, self.device) if drops else None
        run = self._run(inputs.to(self.device), seed_1, self._embedded(inputs))
        return compile_step(self.weights, run, self._activations)

    def clear_gradients(self) -> None:
        """Drops the gradients, and with them their memory; the next `nll` makes room again."""
        for parameter in (*self.trainable_parameters(), *self._trained_factors()):
            parameter.grad = None

    def zero_gradients(self) -> None:
        """Gives every trainable tensor a gradient, zeros where it has none: for a step without rows."""
        if self._flat is not None:
            self._flat.attach_gradients()

    def _trained_factors(self) -> list[nn.Parameter]:
        return [] if self._flat is None else self._flat.factors

    def nll(self, batch: dict[str, Any] | PackedInputs, *, refold: bool = True) -> tuple[Tensor, int]:
        """Returns the summed negative log-likelihood of a batch's targets, in nats, and their number.

        Args:
            batch: as `data.batches` makes it, on the CPU, or packed inputs.
            refold: the adapter may have changed since the last call.

        Returns:
            float32 scalar that carries gradients, and the number of targets in it.
        """
        inputs = batch if isinstance(batch, PackedInputs) else pack_batch(batch)
        trains = self._flat is not None and torch.is_grad_enabled()
        if trains and self._graphs is not None and self.training:
            self._check_length(inputs)
            self._refresh(refold)
            inputs = filled(inputs, self.shape.max_seq_tokens)
            nll = self._graphs.nll(inputs.to(self.device), self._embedded(inputs), self._next_seed())
            return nll, inputs.num_targets
        if self._graphs is not None and not torch.is_grad_enabled():
            self._refresh(refold)
            with self._graphs.room():
                nll = llama.summed_nll(self.weights, self._pass(inputs, False), self._activations)
            return nll.clone(), inputs.num_targets
        run = self._pass(inputs, refold)
        if trains and self._flat is not None:
            self._flat.attach_gradients()
        return llama.summed_nll(self.weights, run, self._activations), inputs.num_targets

    @torch.no_grad()
    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Returns the logits of every token, [T, V]; of several sequences, behind each other. Without dropout."""
        sequences = [ids] if isinstance(ids[0], int) else ids
        run = self._pass(pack_sequences(sequences), True, dropout=False)  # type: ignore[arg-type]
        return llama.logits(self.weights, run, self._activations)

    @torch.no_grad()
    def target_nll(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what every single target of a batch gives, as `model.loss.target_nll` does. Without dropout."""
        self._step_memory = None  # room for the logits
        run = self._pass(pack_batch(batch), self._flat is not None, dropout=False)
        states_ND = llama.final_states(self.weights, run, self._activations, run.inputs.place_N)
        nll, hit = [torch.zeros(0, device=self.device)], [torch.zeros(0, dtype=torch.bool, device=self.device)]
        parts = (torch.split(value, TARGETS_AT_ONCE) for value in (states_ND, run.inputs.target_N))
        for some_ND, wanted_N in zip(*parts, strict=True):
            logits_NV = (some_ND @ self.weights.head_VD.t()).float()
            nll.append(nn.functional.cross_entropy(logits_NV, wanted_N, reduction="none"))
            hit.append(logits_NV.argmax(-1) == wanted_N)
        return torch.cat(nll), torch.cat(hit), (batch["labels"] != IGNORE).nonzero()

    def decoding(self) -> FastDecoding:
        """Returns a batch to be: `start` it with prompts, then `step` token by token. Without dropout."""
        self._refresh(self._flat is not None)
        is_in_use = self._last_decoding is not None and self._last_decoding() is not None
        if self._step_memory is None or is_in_use:
            self._step_memory = StepMemory(self.shape.sizes, self.dtype, self.device)
        decoding = FastDecoding(
            self._next_logits, self.shape.sizes, self._step_memory, max_tokens=self.shape.max_seq_tokens,
            device=self.device, backend=self._backend,
            graphs=self.device.type == "cuda" and not self._embeddings_on_host, prompt_tokens=self.cache_tokens,
        )
        self._last_decoding = weakref.ref(decoding)
        return decoding

    def unwritten_bytes(self) -> int:
        """Returns what its matrices will take of the device beside what is there, once all have been used."""
        return self._matrices.unwritten_bytes(self._groups)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Is the bare base inside the block. Resident matrices with the adapter in them are written twice for that.

        Raises:
            ModelError: products are in FP8, where the adapter is part of every one.
        """
        if self._matrices.fp8 is not None:
            raise ModelError(
                "Products in FP8 cannot leave the adapter out.", next_step="load the model with another weights policy"
            )
        form = self._matrices.form
        try:
            self._take_form(None)
            yield
        finally:
            self._take_form(form)

    def eval(self) -> None:
        """Turns dropout off."""
        self.train(False)

    def train(self, training: bool = True) -> None:
        """Turns dropout on, or off."""
        self.training = training

    def describe(self) -> dict[str, str]:
        """Returns the choices this model runs with, for printing and for the manifest."""
        form = self._matrices.form
        counts = {policy: self._activations.count(policy) for policy in llama.ACTIVATION_POLICIES}
        return {
            "weights": f"{self._matrices.policy}, {str(self._matrices.dtype).removeprefix('torch.')}",
            "activations": ", ".join(f"{policy}: {count} layers" for policy, count in counts.items() if count),
            "embeddings": "host" if self._embeddings_on_host else "device",
            "graphs": "none" if self._graphs is None else "of steps",
            "adapter": "none" if form is None else "folded" if form.folded else "separate",
            "kernels": ": ".join(ops.choose(self.device, self._backend)),
            "max_seq_tokens": str(self.shape.max_seq_tokens),
        }

    def _adapted(self, settings: LoraSettings, form: LoraForm, *meanwhile: Callable[[], None]) -> None:
        """Takes the factors that the groups have now; `meanwhile` runs while kernels are compiled."""
        self.lora = settings
        trainable = [each for group in self._groups for each in group.parameters() if each.requires_grad]
        self._flat = FlatFactors(trainable) if trainable else None
        self._matrices.form = form
        self._step_memory = None
        if trainable:
            with beside(*meanwhile, lambda: self._matrices.prepare_fp8(self._groups)):
                self.prepare()  # before the refresh, which launches kernels too
            self._give_up_cache()
        self._forget_matrices()
        if trainable:
            self._matrices.fill_fp8(self._groups)

    def _forget_matrices(self) -> None:
        """Forgets what was made of weights and adapter for another form of the products, and graphs that read it."""
        if self._graphs is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a replay still runs in memory that goes now
        self._matrices.release(self._groups)
        self._graphs = None
        if self._uses_graphs and self._flat is not None:
            states = self._host_states
            self._graphs = StepGraphs(self._flat, self._loss, None if states is None else states.forget)
        self._refreshing = RepeatedWork(lambda: self._matrices.refresh(self._groups))
        self._refresh(True)

    def _give_up_cache(self) -> None:
        """Gives the device what PyTorch keeps, so that memory of its own may have it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_form(self, form: LoraForm | None) -> None:
        self._step_memory = None  # its graphs compute the other form; before matrices are written, which take memory
        was_folded, self._matrices.form = self._matrices.folded, form
        if was_folded or self._matrices.folded:
            self._forget_matrices()

    def _begin_magnitudes(self) -> None:
        """Gives every magnitude the norm of its row of W, by the operations that will divide by it: g is exactly 1."""
        self._matrices.form = None
        self._matrices.release(self._groups)
        for group in self._groups:
            if group.rescaled:
                norms = self._matrices.row_norms(group)
                for name, pair, norm_O in zip(group.names, group.factors, norms, strict=True):
                    if pair is not None and pair.magnitude_O is not None:
                        check_norm(name, norm_O)
                        pair.magnitude_O.data.copy_(norm_O)

    def _pass(self, inputs: PackedInputs, refold: bool, *, dropout: bool = True) -> llama.Pass:
        self._check_length(inputs)
        self._refresh(refold)
        seed_1 = self._next_seed() if dropout and self.training else None
        return self._run(inputs.to(self.device), seed_1, self._embedded(inputs))

    def _next_seed(self) -> Tensor | None:
        """Returns the number of this micro-step's dropout masks, and counts the step; None without dropout."""
        if self.lora is None or not self.lora.dropout:
            return None
        self.micro_step += 1
        return step_seed(self.dropout_seed, self.micro_step - 1, self.device)

    def _run(
        self, inputs: PackedInputs, seed_1: Tensor | None, embedded_TD: Tensor | None,
        attention: llama.Attention | None = None,
    ) -> llama.Pass:
        return llama.Pass(
            inputs, self._cos_SP, self._sin_SP, self.shape.sizes.head_dim, self.shape.norm_eps, self._matrices, seed_1,
            self._backend, self._host_states if torch.is_grad_enabled() else None, embedded_TD, attention,
        )  # fmt: skip

    def _next_logits(self, inputs: PackedInputs, attention: llama.Attention, place_N: Tensor | None) -> Tensor:
        self._check_length(inputs)
        run = self._run(inputs, None, self._embedded(inputs), attention)
        return llama.logits(self.weights, run, self._activations, place_N)

    def _loss(self, inputs: PackedInputs, embedded_TD: Tensor | None, seed_1: Tensor | None) -> Tensor:
        return llama.summed_nll(self.weights, self._run(inputs, seed_1, embedded_TD), self._activations)

    def _refresh(self, refold: bool) -> None:
        if refold and self.lora is not None:
            num_kept = sum(group.num_kept for group in self._groups)
            self._refreshing.run(num_kept, graph=self.device.type == "cuda")

    def _check_length(self, inputs: PackedInputs) -> None:
        if inputs.max_seqlen > self.shape.max_seq_tokens:
            raise ModelError(
                f"A sequence has {inputs.max_seqlen:,} tokens.", allowed=f"up to {self.shape.max_seq_tokens:,}",
                next_step="load the model with a larger max_seq_tokens",
            )

    @property
    def _embeddings_on_host(self) -> bool:
        return self.weights.embedding_VD.device.type != self.device.type

    def _embedded(self, inputs: PackedInputs) -> Tensor | None:
        """Returns the tokens' embeddings where the table is on the host, else None."""
        if not self._embeddings_on_host:
            return None
        table_VD = self.weights.embedding_VD
        shape = (len(inputs.ids_T), table_VD.shape[1])
        rows_TD = torch.empty(shape, dtype=table_VD.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(table_VD, 0, inputs.ids_T.to(table_VD.device), out=rows_TD)
        return rows_TD.to(self.device, non_blocking=True)


def load_fast(
    folder: Path, *, quantization: str = "nf4", double_quant: bool = True, compute_dtype: str = "auto",
    device: str = "auto", name: str | None = None, vocab_size: int | None = None, max_seq_tokens: int | None = None,
    weights: str = "stream", activations: str | Sequence[str] = "keep", embeddings: str = "device",
    graphs: bool = False, backend: str = "auto",
) -> FastModel:
    """Returns the fast engine's model of a folder, frozen, without an adapter.

    Args:
        folder: as `model.folder.resolve_model` returns it.
        quantization: nf4 or none.
        double_quant: quantise the block scales too.
        compute_dtype: float32, bfloat16, float16 or auto, as in `load_base`.
        device: cpu, cuda, cuda:N or auto.
        name: the name the user gave, which adapters record as their base; None: the folder.
        vocab_size: ids the tokenizer can produce; checked against the embeddings.
        max_seq_tokens: tokens of the longest sequence; None: the model's context.
        weights: stream, resident, stream-fp8 or resident-fp8.
        activations: keep, selective, full, offload or offload-attention, for all layers or one for each.
        embeddings: device, or host: the table stays in the host's memory and only a batch's rows go over; not for a
            model whose head is tied to it.
        graphs: run training steps as CUDA graphs (`model.step_graph`); it pays where launching
            a step takes the host longer than the device works on it.
        backend: of the kernels: auto, fused or reference.

    Raises:
        ModelError: the fast engine does not cover the model, or its files are not whole.
        ConfigError: a setting that this machine or engine cannot have.
    """
    config = read_config(folder)
    shape = read_llama_shape(config, max_seq_tokens=max_seq_tokens)
    place = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, place)
    ops.choose(place, backend)  # raises for kernels that are not there, before anything is read
    policies = layer_policies(activations, shape.sizes.num_layers)
    if embeddings not in ("device", "host"):
        raise ConfigError(f"The embeddings are to be on {embeddings!r}.", allowed="device, host")
    wanted = Wanted(weights, embeddings=embeddings, graphs="always" if graphs else "never")
    check_policies(wanted, shape.sizes, device_memory(str(place)))
    lasting = OwnMemory(place)
    matrices = Matrices(policy=weights, dtype=dtype, backend=backend, lasting=lasting)
    if vocab_size is not None and vocab_size > shape.sizes.vocab:
        raise ModelError(
            f"The tokenizer has {vocab_size:,} ids but the model embeds {shape.sizes.vocab:,}: they do not belong "
            "together.",
            next_step="use the tokenizer files that came with these weights",
        )
    loaded = load_llama_weights(
        folder, shape, quantize=quantizes(config, quantization), double_quant=double_quant, dtype=dtype, device=place,
        embeddings_on_host=embeddings == "host",
        # those that the copies replace leave their memory to everything
        lasting=None if weights == "resident-fp8" else lasting,
    )
    return FastModel(
        loaded, shape, matrices, name=name or str(folder), device=place, activations=policies, backend=backend,
        graphs=graphs,
    )
