"""From safetensors files to weights on a device, one tensor at a time.

A linear map is read, brought to the compute dtype (as transformers does before bitsandbytes quantises, so the codes are
the same bit for bit), moved to its device and quantised there, and its 16-bit form is gone before the next is read:
the host holds one tensor, the device one tensor and its quantisation. Files are memory-mapped, so a shard costs no
memory of its own. Ready-made bitsandbytes checkpoints (4-bit, nf4, with or without double quantisation) are taken as
they are; a map that such a checkpoint left in 16 bits stays so.

Every tensor of the files must be used, and every tensor of the model found: a tensor too many means that the
architecture is not the one the config names. NaN or infinity in a quantised weight is an error; the device says so of
each, and the host looks once, at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from chulengo.errors import ModelError
from chulengo.kernels.applies import KernelError
from chulengo.kernels.reference import nf4
from chulengo.model.allocator import OwnMemory
from chulengo.model.folder import weight_files
from chulengo.model.llama_shape import refuse

# rotary frequencies that old files carry; they follow from the config
SUPERFLUOUS = ("rotary_emb.inv_freq",)


class StoredTensors:
    """The tensors of a model folder, by name; opened with `with`."""

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, quantize: bool, double_quant: bool,
        lasting: OwnMemory | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            folder: with complete safetensors files.
            dtype: of everything that is not quantised, and of weights before they are.
            device: where the tensors go.
            quantize: quantise linear maps to NF4 that are not quantised in the files.
            double_quant: quantise the block scales too.
            lasting: where the tensors go on the device; None: where all others are.
        """
        self._folder, self._dtype, self._device = folder, dtype, device
        self._lasting = lasting
        self._quantize, self._double_quant = quantize, double_quant
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._finite: dict[str, Tensor] = {}  # of every quantised weight
        self._unread: set[str] = set()

    def __enter__(self) -> StoredTensors:
        from safetensors import SafetensorError, safe_open

        for path in weight_files(self._folder):
            try:
                file = self._open.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except SafetensorError as error:
                raise ModelError(f"{path} cannot be read: {error}", next_step="copy or download it again") from error
            self._files |= dict.fromkeys(file.keys(), file)
            self._paths |= dict.fromkeys(file.keys(), path)
        self._unread = {name for name in self._files if not name.endswith(SUPERFLUOUS)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def plain(self, name: str, shape: tuple[int, ...], *, device: torch.device | None = None) -> Tensor:
        """Returns one tensor in the compute dtype on the device, or on another one.

        Raises:
            ModelError: it is missing, of another shape, or not of floats.
        """
        read = self._checked(name, shape)
        place = self._device if device is None else device
        if self._lasting is None or place.type != "cuda":
            return read.to(place)
        return self._lasting.made(lambda: read.to(place))  # not twice on the device

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor in the compute dtype, in the host's memory."""
        stored = self._read(name)
        if tuple(stored.shape) != shape:
            raise ModelError(
                f"{name} in {self._folder} is {tuple(stored.shape)}; the config says {shape}.",
                next_step="check that config.json and the weights belong together",
            )
        if not stored.is_floating_point() or stored.element_size() < 2:
            raise refuse(f"{name} is stored as {stored.dtype}.", allowed="float32, bfloat16, float16, or 4-bit nf4")
        return stored.to(self._dtype)

    def linear(self, name: str, shape: tuple[int, int]) -> nf4.NF4Weight | Tensor:
        """Returns the weight `name` [O, I] of a linear map: as the files have it in 4 bits, quantised now, or plain.

        Raises:
            ModelError: it is missing, of another shape, or quantised in another way.
        """
        parts = self._parts(name)
        if not parts:
            if not self._quantize:
                return self.plain(name, shape)
            quantized = nf4.quantize(self._checked(name, shape).to(self._device), double_quant=self._double_quant)
            self._finite[name] = quantized.is_finite()
            return quantized.placed(self._kept)
        tensors = {key.removeprefix(f"{name}."): self._read(key).to(self._device) for key in parts}
        try:
            stored = nf4.from_state_dict(tensors | {"": self._read(name).to(self._device)})
        except KernelError as error:
            raise refuse(f"{name} is quantised in a form that is not covered: {error.given}", allowed="nf4") from error
        if stored.shape != shape:
            raise ModelError(f"{name} in {self._folder} is {stored.shape}; the config says {shape}.")
        self._finite[name] = stored.is_finite()
        return stored.placed(self._kept)

    def linears(
        self, names: Sequence[str], shapes: Sequence[tuple[int, int]]
    ) -> tuple[list[nf4.NF4Weight | Tensor], Tensor | None]:
        """Returns the weights of maps with one input, as `linear` does, and the matrix whose rows they are.

        It is there where none is quantised, and saves a matrix of their product beside them. Not without memory of
        their own: they are to go one by one.
        """
        is_plain = not self._quantize and not any(self._parts(name) for name in names)
        if self._lasting is None or len(names) == 1 or not is_plain:
            return [self.linear(name, shape) for name, shape in zip(names, shapes, strict=True)], None
        whole = sum(rows for rows, _ in shapes), shapes[0][1]
        joined_OI = self._lasting.made(lambda: torch.empty(whole, dtype=self._dtype, device=self._device))
        parts = torch.split(joined_OI, [rows for rows, _ in shapes])
        for name, shape, part in zip(names, shapes, parts, strict=True):
            part.copy_(self._checked(name, shape))
        return list(parts), joined_OI

    def _parts(self, name: str) -> list[str]:
        """Returns the names of what a weight in 4 bits has beside its codes; of another there are none."""
        return [key for key in self._files if key.startswith(f"{name}.")]

    def skip(self, name: str) -> None:
        """Counts a tensor as used that stands for another one: the head of a model whose head is tied."""
        self._unread.discard(name)

    def check_all_read(self) -> None:
        """Raises `ModelError` when the files have tensors that the model has no place for."""
        if self._unread:
            names = sorted(self._unread)
            raise refuse(
                f"{self._folder} has {len(names)} tensors that this architecture does not: {', '.join(names[:3])}"
                f"{' …' if len(names) > 3 else ''}."
            )

    def check_finite(self) -> None:
        """Raises `ModelError` when a quantised weight had NaN or infinity in it; waits for the device."""
        flags = torch.stack(list(self._finite.values())).tolist() if self._finite else []
        bad = [name for name, fine in zip(self._finite, flags, strict=True) if not fine]
        if bad:
            more = f", and so do {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ModelError(
                f"{bad[0]} in {self._paths[bad[0]]} has values that are NaN or infinite{more}.",
                next_step="copy or download the file again, or ask whoever made it",
            )

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor if self._lasting is None else self._lasting.keep(tensor)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelError(
                f"The weights in {self._folder} lack {name}.",
                next_step="check that config.json and the weights belong together",
            )
        self._unread.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor
