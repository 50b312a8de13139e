"""What a configuration may not say: values out of range, and keys that contradict each other."""

from __future__ import annotations

import math

from chulengo.config.schema import RunConfig
from chulengo.config.sizes import bytes_of

FAST_ONLY = {"model.weights_policy", "model.activations_policy", "model.embeddings_policy", "model.graphs"}
LEAST_GPU_BYTES = 2 << 30  # the CUDA context takes nearly one, measuring a card's speed another
REPORTS = ("tensorboard", "trackio", "mlflow", "wandb")


def out_of_range(config: RunConfig) -> list[str]:
    """Returns one sentence for each number outside its range."""
    lora, training, data = config.lora, config.training, config.data
    at_least_one = {
        "lora.rank": lora.rank,
        "training.batch_size": training.batch_size,
        "training.gradient_accumulation": training.gradient_accumulation,
        "training.log_every_steps": training.log_every_steps,
        "training.keep_checkpoints": training.keep_checkpoints,
        "training.max_seq_tokens": training.max_seq_tokens,
        "training.max_steps": training.max_steps,
        "training.eval_every_steps": training.eval_every_steps,
        "training.save_every_steps": training.save_every_steps,
        "training.early_stopping_patience": training.early_stopping_patience,
        "data.num_rows": data.num_rows,
        "model.cpu_threads": config.model.cpu_threads,
    }
    above_zero = {
        "lora.alpha": lora.alpha,
        "training.epochs": training.epochs,
        "training.learning_rate": training.learning_rate,
        "training.adam_epsilon": training.adam_epsilon,
    }
    shares = {
        "lora.dropout": lora.dropout,
        "data.validation_fraction": data.validation_fraction,
        "training.adam_beta1": training.adam_beta1,
        "training.adam_beta2": training.adam_beta2,
    }
    not_negative = {
        "training.warmup_steps": training.warmup_steps,
        "training.weight_decay": training.weight_decay,
        "training.max_grad_norm": training.max_grad_norm,
        "training.seed": training.seed,
        "data.seed": data.seed,
    }
    problems = [f"{key} must be at least 1, given {v}" for key, v in at_least_one.items() if v is not None and v < 1]
    problems += [f"{key} must be above 0 and finite, given {v}" for key, v in above_zero.items()
                 if not (v > 0 and math.isfinite(v))]
    problems += [f"{key} must be at least 0 and below 1, given {v}" for key, v in shares.items() if not 0 <= v < 1]
    problems += [f"{key} must not be negative, given {v}" for key, v in not_negative.items()
                 if v is not None and not v >= 0]
    problems += [f"training.report_to knows {', '.join(REPORTS)}, given {name!r}"
                 for name in training.report_to if name not in REPORTS]
    limit = config.model.gpu_memory_limit
    if limit is not None and (bytes_of(limit) or 0) < LEAST_GPU_BYTES:
        problems.append(
            f"model.gpu_memory_limit must be a size of at least 2GiB with its unit, such as 8GiB, given {limit!r}"
        )
    if not 0 <= training.warmup_ratio <= 1:
        problems.append(f"training.warmup_ratio must be between 0 and 1, given {training.warmup_ratio}")
    return problems


def contradictions(config: RunConfig, said: set[str]) -> list[str]:
    """Returns one sentence for each set of keys that cannot hold together.

    Args:
        config: the whole configuration.
        said: the `section.key` names that were given, as opposed to left at their default.
    """
    model, data, training = config.model, config.data, config.training
    has_validation = data.validation is not None or data.validation_fraction > 0
    rules = [
        ({"training.epochs", "training.max_steps"} <= said and training.max_steps is not None,
         "training.epochs and training.max_steps both say how long to train; give one"),
        ({"training.warmup_ratio", "training.warmup_steps"} <= said and training.warmup_steps is not None,
         "training.warmup_ratio and training.warmup_steps both say how long to warm up; give one"),
        ("training.warmup_steps" in said and bool(training.warmup_steps) and training.schedule == "constant",
         "training.schedule constant has no warm-up; use constant_with_warmup or drop training.warmup_steps"),
        ("model.double_quant" in said and model.double_quant and model.quantization in ("int8", "none"),
         f"model.double_quant needs 4-bit weights, but model.quantization is {model.quantization}"),
        (training.allow_cut_end_of_turn and training.overlong != "cut",
         f"training.allow_cut_end_of_turn only applies to overlong: cut, but training.overlong is "
         f"{training.overlong}"),
        (training.early_stopping_patience is not None and not has_validation,
         "training.early_stopping_patience needs validation rows, but data.validation_fraction is 0"),
        ("training.keep_best" in said and training.keep_best and not has_validation,
         "training.keep_best needs validation rows, but data.validation_fraction is 0"),
        (data.validation is not None and "data.validation_fraction" in said and data.validation_fraction > 0,
         "data.validation and data.validation_fraction both say what to validate on; give one"),
        (data.streaming and data.validation is None and data.validation_fraction > 0,
         "data.streaming cannot split off validation rows; give data.validation or data.validation_fraction: 0"),
        (data.streaming and data.drop_duplicates,
         "data.streaming cannot see all rows at once, which data.drop_duplicates needs"),
        (training.max_steps is not None and training.early_stopping_patience is not None
         and training.eval_every_steps is not None and training.eval_every_steps > training.max_steps,
         "training.eval_every_steps is beyond training.max_steps, so early stopping can never look"),
        (model.device == "cpu" and training.precision == "fp16",
         "training.precision fp16 needs a GPU, but model.device is cpu; use bf16 or float32"),
        (model.device == "cpu" and model.gpu_memory_limit is not None,
         "model.gpu_memory_limit is of a GPU, but model.device is cpu; leave one out"),
        (model.device == "cpu" and model.attention == "flash_attention_2",
         "model.attention flash_attention_2 needs a GPU, but model.device is cpu; use sdpa"),
        (training.precision == "fp16" and model.compute_dtype == "bfloat16",
         "training.precision fp16 and model.compute_dtype bfloat16 ask for different 16-bit types"),
        (training.precision == "bf16" and model.compute_dtype == "float16",
         "training.precision bf16 and model.compute_dtype float16 ask for different 16-bit types"),
        (training.gradient_checkpointing and model.activations_policy in ("keep", "selective"),
         f"training.gradient_checkpointing recomputes all activations, but model.activations_policy is "
         f"{model.activations_policy}; give one"),
        (model.engine == "reference" and bool(FAST_ONLY & said)
         and (model.weights_policy, model.activations_policy, model.embeddings_policy, model.graphs) != ("auto",) * 4,
         f"{', '.join(sorted(FAST_ONLY))} are the fast engine's, but model.engine is reference; "
         "to recompute there: training.gradient_checkpointing"),
        (model.weights_policy.endswith("fp8") and (config.lora.dropout > 0 or config.lora.dora),
         f"model.weights_policy is {model.weights_policy}, but products in FP8 take no "
         f"lora.{'dropout' if config.lora.dropout > 0 else 'dora'}; give one"),
        (bool(config.prompt.train_roles) is False and config.prompt.train_on != "everything",
         "prompt.train_roles is empty, so no token would carry loss"),
    ]
    return [sentence for broken, sentence in rules if broken]
