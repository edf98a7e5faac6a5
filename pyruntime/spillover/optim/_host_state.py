"""The state of parameters in host memory: which arrays, in which form, and where they lie.

Note [Memory before training]
-----------------------------
The arrays of all parameters that require gradients are set aside when an optimizer is made, or a
group is added, so that a want of memory is known before training starts. ``optimizer.state`` gets
them at a parameter's first step, as torch's does. They lie side by side in a few pinned slabs, but
each has a storage of its own, so that ``torch.save`` of one writes that one. An array stays that of
its parameter until the parameter changes its shape, type or order in memory.

Note [Bytes per parameter]
--------------------------
A moment takes 4 bytes an element in float32, 2 in bfloat16, and in 8 bits 1 and a float32 scale for
256 elements. A float32 weight has no master. One of bfloat16 or float16 has a master of 4 bytes;
with ``master="split"`` a bfloat16 weight on the host has a remainder of 2. Nothing else grows with
the parameters.

Note [Addresses that are alike]
-------------------------------
A step reads and writes one place of all arrays of a parameter at once. Where these addresses are
alike in their lower bits, as those of arrays of 2^28 bytes in slabs of their own, they share cache
sets, way predictors and banks of memory, and every kernel for the CPU is slower by up to half:
ours, torch's and DeepSpeed's. So large arrays do not begin where the last one would have, but
``STAGGER_BYTES`` after that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from spillover._core import BLOCK_ELEMENTS, HostPool
from spillover._errors import ConfigError, HostOutOfMemory
from spillover._layout import dense_stride, flat_view
from spillover._pinned import host_pool
from spillover._units import format_bytes
from spillover.optim import _kernels
from spillover.optim._algorithms import Algorithm, Group
from spillover.optim._kernels import Blockwise, MomentFormat

Master = Literal["float32", "split"]
Form = Literal["float32", "bfloat16", "blockwise8", "int16"]

MASTER = "master"
REMAINDER = "remainder"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int16": torch.int16}
# Of one allocation; a larger array has one of its own.
_SLAB_BYTES_MAX = 256 << 20
_ALIGNMENT = 64
#: Between large arrays; Note [Addresses that are alike]. A page, and a few cache lines.
STAGGER_BYTES = 4096 + 256
_STAGGERED_BYTES_MIN = 4 << 20
# Slabs after which places repeat.
_STAGGER_TURNS = 16


@dataclass(frozen=True)
class StateOptions:
    """In which form state is kept; plain values, for copies and pickles."""

    moments: MomentFormat = "float32"
    master: Master = "float32"

    def check(self) -> None:
        """Raise ConfigError for values that are not known."""
        for name, value, known in (
            ("moments", self.moments, get_args(MomentFormat)),
            ("master", self.master, get_args(Master)),
        ):
            if value not in known:
                choices = ", ".join(map(repr, known))
                raise ConfigError(f"{name}={value!r} is not known; choose one of {choices}")


@dataclass(frozen=True, eq=False)
class BlockwiseState:
    """A moment in 8 bits, in the order in memory of its parameter."""

    moment: Blockwise
    shape: torch.Size
    stride: tuple[int, ...]
    is_signed: bool

    def to(self, device: torch.device, **_: Any) -> BlockwiseState:
        """Itself: it stays where it is. Tools that move state to a device call this."""
        return self

    def to_float32(self) -> torch.Tensor:
        """A copy of the parameter's shape, in pageable memory; as a moment it is the same again."""
        values = torch.empty_strided(self.shape, self.stride, dtype=torch.float32, device="cpu")
        _kernels.decode_blockwise(self.moment, signed=self.is_signed, into=flat_view(values))
        return values

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return int(self.moment.codes.nbytes + self.moment.scales.nbytes)


Array = torch.Tensor | BlockwiseState


@dataclass(frozen=True)
class Wanted:
    """An array that a parameter's state has."""

    form: Form
    is_signed: bool = True

    def size_bytes(self, count: int) -> int:
        """Of ``count`` elements; Note [Bytes per parameter]."""
        if self.form == "blockwise8":
            return count + 4 * -(-count // BLOCK_ELEMENTS)
        return count * _DTYPES[self.form].itemsize


def wanted_arrays(
    algorithm: Algorithm, options: StateOptions, parameter: torch.Tensor, group: Group
) -> dict[str, Wanted]:
    """What the state of ``parameter`` has, by name; step counts apart."""
    found = {
        spec.name: Wanted(options.moments, spec.is_signed) for spec in algorithm.moments(group)
    }
    if parameter.dtype != torch.float32:
        is_split = (
            options.master == "split"
            and parameter.dtype == torch.bfloat16
            and parameter.device.type == "cpu"
        )
        if is_split:
            found[REMAINDER] = Wanted("int16")
        else:
            found[MASTER] = Wanted("float32")
    return found


def is_like(array: Any, wanted: Wanted, parameter: torch.Tensor) -> bool:
    """Whether ``array`` has the form, shape and order in memory that are wanted."""
    if not isinstance(array, torch.Tensor | BlockwiseState) or array.shape != parameter.shape:
        return False
    stride = tuple(array.stride() if isinstance(array, torch.Tensor) else array.stride)
    if stride != dense_stride(parameter):
        return False
    if isinstance(array, BlockwiseState):
        return wanted.form == "blockwise8" and array.is_signed == wanted.is_signed
    return array.device.type == "cpu" and array.dtype == _DTYPES.get(wanted.form)


def assign(array: Array, values: torch.Tensor) -> None:
    """Write ``values``, of the same shape, of any type, device and strides."""
    if isinstance(array, torch.Tensor):
        array.copy_(values)
        return
    ordered = torch.empty_strided(array.shape, array.stride, dtype=torch.float32, device="cpu")
    _kernels.encode_blockwise(
        flat_view(ordered.copy_(values)), signed=array.is_signed, into=array.moment
    )


def fill(array: Array, value: float) -> None:
    """Have all elements be ``value``."""
    if isinstance(array, torch.Tensor):
        array.fill_(value)
    elif value == 0.0:
        array.moment.codes.zero_()
        array.moment.scales.zero_()
    else:
        assign(array, torch.tensor(value, device="cpu").expand(array.shape))


class StateMemory:
    """The arrays of each parameter of one optimizer. Not thread-safe, as optimizers are not."""

    def __init__(self, pool: HostPool | None) -> None:
        self._pool = pool
        self._turn = 0
        self._arrays: dict[torch.Tensor, dict[str, Array]] = {}

    def get(self, parameter: torch.Tensor, name: str) -> Array:
        """An array that was reserved, with whatever is in it."""
        return self._arrays[parameter][name]

    def tensor(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """One that is not in 8 bits."""
        found = self.get(parameter, name)
        assert isinstance(found, torch.Tensor)
        return found

    def all_arrays(self) -> Iterable[Array]:
        """Of all parameters."""
        return (array for arrays in self._arrays.values() for array in arrays.values())

    def size_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.all_arrays())

    def reserve(self, wanted: Sequence[tuple[torch.Tensor, dict[str, Wanted]]], what: str) -> None:
        """Have the arrays that are wanted; those that are there already stay. All or nothing.

        Raises
        ------
        HostOutOfMemory
            The pool's budget or the machine does not have them; the message has the bytes.
        """
        missing = [
            (parameter, name, each)
            for parameter, arrays in wanted
            for name, each in arrays.items()
            if not is_like(self._arrays.get(parameter, {}).get(name), each, parameter)
        ]
        sizes = [each.size_bytes(parameter.numel()) for parameter, _, each in missing]
        try:
            places = self._allocate(sizes)
        except HostOutOfMemory as error:
            count = len({id(parameter) for parameter, _, _ in missing})
            raise HostOutOfMemory(
                f"{what} needs {sum(sizes)} bytes ({format_bytes(sum(sizes))}) of pinned host "
                f"memory for the state of {count} parameter{'s' if count != 1 else ''}, beside "
                f"{self.size_bytes()} that it has; smaller state: moments='bfloat16' or "
                f"'blockwise8': {error}"
            ) from error
        for (parameter, name, each), place in zip(missing, places, strict=True):
            self._arrays.setdefault(parameter, {})[name] = shaped(
                place, each, parameter.shape, dense_stride(parameter)
            )
        for parameter, arrays in wanted:
            held = self._arrays.get(parameter, {})
            for name in [name for name in held if name not in arrays]:
                del held[name]

    def forget_all_but(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let go of the arrays of other parameters."""
        kept = {id(parameter) for parameter in parameters}
        for parameter in [each for each in self._arrays if id(each) not in kept]:
            del self._arrays[parameter]

    def _allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Memory of so many bytes each, in slabs."""
        slabs: list[list[tuple[int, int]]] = []
        used = 0
        for size in sizes:
            if not slabs or used + size > _SLAB_BYTES_MAX:
                slabs.append([])
                used = self._lead(size)
            elif size >= _STAGGERED_BYTES_MIN:
                used += STAGGER_BYTES
            slabs[-1].append((used, size))
            used += _aligned(size)
        found: list[torch.Tensor] = []
        for slab in slabs:
            memory = self._slab(sum(slab[-1]))
            for offset, size in slab:
                # A storage of its own, which holds the slab.
                found.append(torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset))
        return found

    def _lead(self, size_bytes: int) -> int:
        """Where the first array of the next slab begins; Note [Addresses that are alike]."""
        if size_bytes < _STAGGERED_BYTES_MIN:
            return 0
        self._turn = (self._turn + 1) % _STAGGER_TURNS
        return self._turn * STAGGER_BYTES

    def _slab(self, size_bytes: int) -> Any:
        if torch.cuda.is_available():
            return (self._pool or host_pool()).allocate(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu").numpy()


def shaped(
    place: torch.Tensor, wanted: Wanted, shape: torch.Size, stride: tuple[int, ...]
) -> Array:
    """An array over the bytes of ``place``."""
    if wanted.form != "blockwise8":
        flat: torch.Tensor = place.view(_DTYPES[wanted.form])
        return flat.as_strided(shape, stride, flat.storage_offset())
    scales_bytes = place.numel() - shape.numel()
    # Scales first, since they need the alignment.
    scales, codes = place[:scales_bytes].view(torch.float32), place[scales_bytes:]
    return BlockwiseState(Blockwise(codes, scales), shape, stride, wanted.is_signed)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
