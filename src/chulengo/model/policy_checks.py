"""What the fast engine cannot have where it is insisted on: asked by `plan` and `train`, before a weight is read.

No torch: `plan --device-memory` asks of a device that is not there.
"""

from __future__ import annotations

from chulengo.errors import ConfigError
from chulengo.kernels import limits
from chulengo.model.covered import fp8_rows_not_covered, fp8_widths_not_covered
from chulengo.model.plan import DeviceMemory
from chulengo.model.plan_policies import SETTING, Wanted
from chulengo.model.plan_shapes import ModelShape


def check_policies(wanted: Wanted, shape: ModelShape, device: DeviceMemory) -> None:
    """Raises `ConfigError` for the first policy that is insisted on and that the model or the device cannot have.

    Args:
        wanted: what the user insists on.
        shape: of the model.
        device: where it goes; of a GPU whose compute capability is not known, what is asked for is taken as there.
    """
    if wanted.weights.endswith("fp8"):
        _check_fp8(wanted.weights, shape, device)
    if wanted.embeddings == "host" and shape.tied:
        raise ConfigError(
            f"{SETTING['embeddings']} is host, and the model's head is the same table, which every step multiplies by.",
            allowed="auto, device", next_step=_leave("embeddings"),
        )
    if wanted.graphs == "always" and device.kind != "cuda":
        raise ConfigError(
            f"{SETTING['graphs']} is always, and there are no CUDA graphs on {device.name}.", allowed="auto, never",
            next_step=_leave("graphs"),
        )


def _check_fp8(weights: str, shape: ModelShape, device: DeviceMemory) -> None:
    """A CPU has products of all sizes, in plain PyTorch."""
    if device.kind != "cuda":
        return
    if device.capability is not None and device.capability < limits.FP8_CAPABILITY:
        least, own = (".".join(map(str, each)) for each in (limits.FP8_CAPABILITY, device.capability))
        raise ConfigError(
            f"{SETTING['weights']} is {weights}, and {device.name} has no products in FP8 (compute capability {own}).",
            allowed=f"GPUs of compute capability {least} and above", next_step=_leave("weights"),
        )
    if (long := fp8_rows_not_covered(shape)) is not None:
        raise ConfigError(
            f"{SETTING['weights']} is {weights}, which does not take this model. {long}", next_step=_leave("weights")
        )
    if (odd := fp8_widths_not_covered(shape)) is not None:
        raise ConfigError(
            f"{SETTING['weights']} is {weights}, and the model has {odd} features, for which there are no products in "
            "FP8.",
            allowed=f"multiples of {limits.FP8_STEP}", next_step=_leave("weights"),
        )


def _leave(policy: str) -> str:
    return f"--set {SETTING[policy]}=auto"
