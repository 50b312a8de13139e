"""Everything a run can be told, with its defaults. The one place where a default is written down.

A field's comment is its documentation: the reference page is made from it. Values named `auto` are resolved once,
at the start of the run, printed, and written resolved into the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["sdpa", "eager", "flash_attention_2"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Engine = Literal["auto", "fast", "reference"]
WeightsPolicy = Literal["auto", "stream", "resident", "fp8", "stream-fp8", "resident-fp8"]
ActivationsPolicy = Literal["auto", "keep", "selective", "full", "offload", "offload-attention"]
EmbeddingsPolicy = Literal["auto", "device", "host"]
GraphsPolicy = Literal["auto", "always", "never"]  # not on and off, which YAML reads as true and false
Quantization = Literal["nf4", "fp4", "int8", "none"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
OverlongPolicy = Literal["error", "drop", "drop_turns", "cut", "split"]
Batching = Literal["padded", "group_by_length", "packed"]
TrainOn = Literal["answers", "last_answer", "everything"]
Schedule = Literal["constant", "linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"]
OptimizerName = Literal["adamw", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights, and in which form they are held."""

    name: str = "nano"  # "nano" (embedded), a folder with config.json and safetensors, or a Hub name
    revision: str | None = None  # Hub revision (branch, tag or commit)
    engine: Engine = "auto"  # fast: our own; reference: transformers + peft + bitsandbytes; auto: fast where it applies
    quantization: Quantization = "nf4"  # how the frozen weights are held
    double_quant: bool = True  # quantise the NF4/FP4 block scales too
    compute_dtype: DtypeName = "auto"  # dtype of products; auto: bfloat16 on a GPU that has it, float32 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    gpu_memory_limit: str | None = None  # most GPU memory this process may take, such as 8GiB; None: all that is free
    cpu_threads: int | None = None  # threads of products on a CPU; None: PyTorch's choice
    attention: Attention = "sdpa"  # transformers' attention implementation; the fast engine has its own
    weights_policy: WeightsPolicy = "auto"  # fast engine: matrices written at each use or kept; in FP8 (auto: never)
    activations_policy: ActivationsPolicy = "auto"  # fast engine: what the backward pass finds (auto: all that fits)
    embeddings_policy: EmbeddingsPolicy = "auto"  # fast engine: where their table is (auto: on the device if it fits)
    graphs: GraphsPolicy = "auto"  # fast engine: steps as CUDA graphs (auto: on a GPU, where launching takes longer)
    retry_leaner: bool = False  # fast engine, one process: out of memory in step 1: begin again with leaner policies
    offline: bool = False  # True (or HF_HUB_OFFLINE=1): a Hub name that is not in the local cache is an error


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which conversations, and what happens to them before they are rendered."""

    train: str = ""  # file, folder or Hub name
    validation: str | None = None  # the same; None: split off `train`
    validation_fraction: float = 0.1  # share of conversations split off when `validation` is None; 0: none
    format: str = "auto"  # auto, or one of `chulengo inspect --formats`
    columns: dict[str, str] = field(default_factory=dict)  # our field name -> the data's column name
    hub_split: str = "train"  # which split of a Hub data set
    num_rows: int | None = None  # random subset of this many rows; None: all
    seed: int = 0  # of the subset and of the split
    cleaning: tuple[str, ...] = ()  # named steps, applied in this order
    drop_duplicates: bool = False  # exact duplicates are always counted; True drops them
    streaming: bool = False  # read rows as they are needed, never the whole set


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """How a conversation becomes tokens, and which of them carry loss."""

    style: str = "auto"  # auto, llama2, guanaco, chatml, llama3, mistral, plain, tokenizer
    system: str | None = None  # system prompt for conversations without one
    template: str | None = None  # YAML file with system, user, answer: columns -> messages
    train_on: TrainOn = "answers"  # which turns carry loss
    train_roles: tuple[str, ...] = ("assistant",)  # whose turns carry loss
    train_end_of_turn: bool = True  # whether the end-of-turn token after a trained turn carries loss


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter. Names and meaning are PEFT's."""

    rank: int = 16  # inner dimension r of B·A
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # dropout on the adapter's input while training
    targets: tuple[str, ...] = ("all-linear",)  # module names, or all-linear
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # weight-decomposed LoRA
    train_head: bool = False  # train (and save) lm_head in full
    train_embeddings: bool = False  # train (and save) the input embeddings in full


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The optimisation."""

    max_seq_tokens: int | None = None  # None: the model's own context
    overlong: OverlongPolicy = "error"  # rows longer than max_seq_tokens
    allow_cut_end_of_turn: bool = False  # `overlong: cut` may remove a row's end-of-turn token
    batching: Batching = "group_by_length"  # padded, group_by_length, or packed (exact, block-diagonal)
    batch_size: int = 4  # rows (packs, when packed) a device and micro-step
    gradient_accumulation: int = 1  # micro-steps an optimiser step
    epochs: float = 1.0  # passes over the training rows
    max_steps: int | None = None  # optimiser steps; overrides epochs
    learning_rate: float = 2e-4  # peak learning rate
    schedule: Schedule = "cosine"  # course of the learning rate after warm-up
    warmup_ratio: float = 0.03  # share of all steps
    warmup_steps: int | None = None  # overrides warmup_ratio
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    optimizer: OptimizerName = "adamw"  # adamw is PyTorch's; the others are bitsandbytes'
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the denominator
    max_grad_norm: float = 1.0  # 0: no clipping
    precision: Precision = "auto"  # autocast (fast engine: of everything); auto: bf16 on GPU, none on CPU
    gradient_checkpointing: bool = False  # recompute activations in the backward pass; fast engine: activations full
    log_every_steps: int = 1  # optimiser steps between metric rows
    eval_every_steps: int | None = None  # None: once an epoch
    save_every_steps: int | None = None  # None: once an epoch
    keep_checkpoints: int = 2  # newest ones that are kept, beside the best
    early_stopping_patience: int | None = None  # evaluations without improvement; None: off
    keep_best: bool = True  # the saved adapter is the one with the lowest validation loss
    seed: int = 0  # initialisation, order, dropout
    report_to: tuple[str, ...] = ()  # tensorboard, trackio, mlflow, wandb


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    out: str | None = None  # run folder; None: runs/<model>-<data>
