"""One streamed block: its weights in pinned host memory and, for a while, a copy on the device.

A block belongs to one WeightStreamer and is used by one host thread at a time: the thread that runs
forward, or autograd's thread while that one waits inside backward().

Invariants
----------
- ``weight.parameter`` (the Parameter that users, optimizers and ``state_dict`` see) is always a CPU
  tensor over its part of ``host``.
- ``weight.leaf`` (the Parameter that operators see while the block runs) reads NaN through
  ``stand_in`` unless the block is installed; then it is a view of ``buffer``.
- ``buffer is None`` means that no copy is on the device; otherwise the copy is complete once
  ``ready`` has happened.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from spillover._errors import StateError
from spillover._layout import dense_stride
from spillover._pinned import empty_pinned
from spillover._streams import new_event

# The largest alignment that torch's vectorised kernels and copies ask for.
_ALIGNMENT = 512

ByteArray: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(eq=False)
class StreamedWeight:
    """One Parameter of a block; ``places`` lists the modules and attributes that hold it."""

    name: str
    parameter: nn.Parameter
    leaf: nn.Parameter
    places: list[tuple[nn.Module, str]]
    stand_in: torch.Tensor
    offset_bytes: int
    size_bytes: int
    stride: tuple[int, ...]
    host_address: int = 0
    leaf_version: int = 0
    gradient_slot: weakref.ref[ByteArray] | None = None
    gradients_pending: int = 0

    def over(self, array: ByteArray) -> torch.Tensor:
        """A tensor of this weight's shape over ``array``, as a storage of its own.

        Own storages keep ``torch.save`` from writing a whole block for each of its weights.
        """
        if array.size == 0:
            return torch.empty_strided(
                self.leaf.shape, self.stride, dtype=self.leaf.dtype, device="cpu"
            )
        flat = torch.frombuffer(array, dtype=self.leaf.dtype)
        return flat.as_strided(self.leaf.shape, self.stride).detach()


@dataclass(eq=False)
class StreamedBlock:
    """See the module's text for what holds between the fields."""

    index: int
    name: str
    module: nn.Module
    device: torch.device
    weights: list[StreamedWeight]
    size_bytes: int
    host: torch.Tensor
    buffer: torch.Tensor | None = None
    ready: torch.cuda.Event = field(default_factory=new_event)
    home: torch.cuda.Stream | None = None
    consumers: list[torch.cuda.Stream] = field(default_factory=list)
    versions: tuple[int, ...] = ()
    gradients: torch.Tensor | None = None
    depth: int = 0
    installed: bool = False
    used_at: int = 0

    def __post_init__(self) -> None:
        self.offsets = [weight.offset_bytes for weight in self.weights]

    def current_versions(self) -> tuple[int, ...]:
        """Version counters of the host weights; they grow with every in-place change."""
        return tuple(weight.parameter._version for weight in self.weights)

    def is_fresh(self) -> bool:
        """Whether the device holds a copy of the weights as they are now."""
        return self.buffer is not None and self.versions == self.current_versions()

    def weight_at(self, offset_bytes: int) -> int:
        """Index of the weight that lies at this offset of the buffer."""
        return bisect_right(self.offsets, offset_bytes) - 1

    def verify(self) -> None:
        """Check that the modules still hold the Parameters that are streamed.

        A Parameter whose ``data`` was set to another CPU tensor is taken over; the rest raises.
        """
        for weight in self.weights:
            for module, attribute in weight.places:
                if module._parameters.get(attribute) is not weight.parameter:
                    raise StateError(
                        f"weight {weight.name!r} was replaced by another Parameter while it is "
                        "streamed; call remove() on the handle first, or copy into the existing "
                        "Parameter (load_state_dict without assign=True)"
                    )
            parameter = weight.parameter
            if parameter._backward_hooks:
                raise StateError(
                    f"weight {weight.name!r} has a tensor hook, which does not run for streamed "
                    "weights; use register_post_accumulate_grad_hook instead"
                )
            if weight.size_bytes and parameter.data_ptr() != weight.host_address:
                self._adopt(weight)
            if weight.leaf.requires_grad != parameter.requires_grad:
                weight.leaf.requires_grad_(parameter.requires_grad)

    def _adopt(self, weight: StreamedWeight) -> None:
        parameter = weight.parameter
        leaf = weight.leaf
        if parameter.device.type != "cpu" or parameter.dtype != leaf.dtype:
            raise StateError(
                f"weight {weight.name!r} became {parameter.dtype} on {parameter.device} while it "
                f"is streamed as {leaf.dtype} from the host; call remove() on the handle first"
            )
        if parameter.shape != leaf.shape:
            raise StateError(f"weight {weight.name!r} changed its shape while it is streamed")
        # A copy that was started ahead may be reading the old values still.
        self.ready.synchronize()
        with torch.no_grad():
            home = weight.over(self._part(self.host, weight))
            home.copy_(parameter.data)
            parameter.data = home
            # The version counter does not show a change of `data`, so the copy is dropped by hand.
            self.versions = ()

    @staticmethod
    def _part(flat: torch.Tensor, weight: StreamedWeight) -> ByteArray:
        part: ByteArray = flat.numpy()[
            weight.offset_bytes : weight.offset_bytes + weight.size_bytes
        ]
        return part

    def install(self) -> None:
        """Let operators inside of the block find the device copy; ``_parameters`` stays as it is.

        An entry in a module's ``__dict__`` goes before its ``_parameters``, so ``module.weight``
        gives the leaf while ``named_parameters()``, ``state_dict()`` and optimizers go on seeing
        the host Parameter.
        """
        if self.installed:
            return
        assert self.buffer is not None
        for weight in self.weights:
            elements = self.buffer[weight.offset_bytes : weight.offset_bytes + weight.size_bytes]
            weight.leaf.data = elements.view(weight.leaf.dtype).as_strided(
                weight.leaf.shape, weight.stride
            )
            weight.leaf_version = weight.leaf._version
            for module, attribute in weight.places:
                module.__dict__[attribute] = weight.leaf
        self.installed = True

    def uninstall(self) -> None:
        """Undo ``install``; the device copy stays until it is released."""
        if not self.installed:
            return
        for weight in self.weights:
            weight.leaf.data = weight.stand_in
            for module, attribute in weight.places:
                if module.__dict__.get(attribute) is weight.leaf:
                    del module.__dict__[attribute]
        self.installed = False

    def changed_inside(self) -> str | None:
        """Name of a weight that the block's own forward changed in place, if any."""
        for weight in self.weights:
            if weight.leaf._version != weight.leaf_version:
                weight.leaf_version = weight.leaf._version
                return weight.name
        return None

    def gradient_target(self, weight: StreamedWeight) -> torch.Tensor:
        """Pinned memory for a gradient that becomes ``parameter.grad``.

        The weight's own slot is used again only once nobody holds the gradient that was there;
        a caller who kept it keeps its values, as with torch.
        """
        if self.gradients is None:
            self.gradients = empty_pinned((self.size_bytes,), torch.uint8)
        held = weight.gradient_slot() if weight.gradient_slot is not None else None
        if held is not None:
            flat = empty_pinned((weight.size_bytes,), torch.uint8)
            return weight.over(flat.numpy())
        slot = self._part(self.gradients, weight)
        weight.gradient_slot = weakref.ref(slot)
        return weight.over(slot)


def build_block(
    *,
    index: int,
    name: str,
    module: nn.Module,
    parameters: list[nn.Parameter],
    device: torch.device,
    stand_ins: dict[torch.dtype, torch.Tensor],
) -> StreamedBlock:
    """Move ``parameters`` into one pinned allocation, keeping the Parameter objects.

    The model may start on the CPU or on the device; no copy is made on the device.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {key: [] for key in parameters}
    names: dict[nn.Parameter, str] = {}
    for module_name, child in module.named_modules(prefix=name):
        for attribute, parameter in child._parameters.items():
            if parameter is not None and parameter in places:
                places[parameter].append((child, attribute))
                names.setdefault(parameter, f"{module_name}.{attribute}")
    weights: list[StreamedWeight] = []
    offset = 0
    for parameter in parameters:
        scalar = stand_ins.get(parameter.dtype)
        if scalar is None:
            scalar = _poison(parameter.dtype, device)
            stand_ins[parameter.dtype] = scalar
        stand_in = scalar.expand(parameter.shape)
        leaf = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        leaf.__dict__.update(parameter.__dict__)
        weights.append(
            StreamedWeight(
                name=names[parameter],
                parameter=parameter,
                leaf=leaf,
                places=places[parameter],
                stand_in=stand_in,
                offset_bytes=offset,
                size_bytes=parameter.nbytes,
                stride=dense_stride(parameter),
            )
        )
        offset += _round_up(parameter.nbytes)
    block = StreamedBlock(
        index=index,
        name=name,
        module=module,
        device=device,
        weights=weights,
        size_bytes=offset,
        host=empty_pinned((offset,), torch.uint8),
    )
    with torch.no_grad():
        for weight in weights:
            _move_in(block, weight)
    return block


def _poison(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device)


def _move_in(block: StreamedBlock, weight: StreamedWeight) -> None:
    parameter = weight.parameter
    home = weight.over(StreamedBlock._part(block.host, weight))
    home.copy_(parameter.data)
    # Before anything is assigned: a gradient must not be lost if there is no memory for it.
    gradient = parameter.grad.to("cpu") if parameter.grad is not None else None
    parameter.grad = None
    parameter.data = home
    parameter.grad = gradient
    weight.host_address = home.data_ptr()
