"""What one step of an optimizer on the host works on: checked parameters and ranges for kernels."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from spillover._errors import ConfigError
from spillover._layout import flat_view, is_dense
from spillover._stalls import Timed
from spillover.optim._algorithms import Algorithm, Group
from spillover.optim._host_gradient import PendingGradient
from spillover.optim._host_state import Array
from spillover.optim._kernels import Range, make_range
from spillover.optim._staging import Piece, cut, end_of
from spillover.optim._state_store import Part, StateArrays, StateStore

_UPDATE = Timed("optimizer", "update")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False, kw_only=True)
class Work:
    """One parameter to update.

    Attributes
    ----------
    gradient
        Of the parameter's strides; flat where it is off the device, and ``pending`` is there.
    entry, late
        The parameter's state, and what the step adds to it at its end.
    has_master, has_remainder
        Whether the state has one.
    arrays
        The whole state; None where it comes in parts.
    number
        Of this step, from 1.
    needs_weight
        Whether the weight must come to the host though there is a master.
    loaded_master
        A whole master, flat, that is to be split now.
    done
        Elements that are updated: those of a step that failed midway, before this one began.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    group: Group
    entry: dict[str, Any]
    late: dict[str, Array]
    has_master: bool
    has_remainder: bool
    arrays: StateArrays | None
    number: int
    needs_weight: bool = False
    loaded_master: torch.Tensor | None = None
    pending: PendingGradient | None = None
    done: int = 0

    @property
    def factor(self) -> float:
        """By which the gradient counts more than its bytes say."""
        return 1.0 if self.pending is None else self.pending.factor

    @property
    def is_low(self) -> bool:
        """Whether something else than the weight is what is updated."""
        return self.has_master or self.has_remainder

    @property
    def reads_weight(self) -> bool:
        """Whether the weight comes to the host: it is what is updated, or somebody asks for it."""
        return not self.has_master or self.needs_weight

    def range(
        self, state: StateArrays, start: int, gradient: torch.Tensor, weight: torch.Tensor
    ) -> Range:
        """Elements from ``start`` on; their state, gradients and weights are flat, on the host."""
        if not math.isfinite(self.factor):
            # Kernels take no such factor; what comes of it is what torch makes of it.
            gradient = gradient.float() * self.factor
        return make_range(
            gradient=gradient,
            weight=state.master if self.is_low else weight,
            low_weight=weight if self.is_low else None,
            remainder=state.remainder,
            first=state.moments.get("first"),
            second=state.moments.get("second"),
            second_max=state.moments.get("second_max"),
            step=self.number,
            first_index=start,
        )


def update(
    algorithm: Algorithm,
    store: StateStore,
    parts: Sequence[Part],
    gradients: Sequence[torch.Tensor],
) -> None:
    """One step of a batch, in place, with the parts' gradients; blocks."""
    states = store.acquire(parts)
    ranges = [
        part.work.range(state, part.start, gradient, part.weight)
        for part, state, gradient in zip(parts, states, gradients, strict=True)
    ]
    _UPDATE.call(lambda: _update(algorithm, parts, ranges))
    for part in parts:
        part.work.done = part.start + part.count
    store.release(parts)


def _update(algorithm: Algorithm, parts: Sequence[Part], ranges: Sequence[Range]) -> None:
    # By groups too, where a step is in the order of forward.
    chosen: dict[tuple[int, float], tuple[Group, list[Range]]] = {}
    for part, each in zip(parts, ranges, strict=True):
        work = part.work
        factor = work.factor if math.isfinite(work.factor) else 1.0
        chosen.setdefault((id(work.group), factor), (work.group, []))[1].append(each)
    for (_, factor), (group, alike) in chosen.items():
        algorithm.update(alike, group, factor)


def host_batches(group: Iterable[Work], store: StateStore) -> Iterator[list[Part]]:
    """The weights of one group that are on the host, in parts."""
    batch: list[Part] = []
    current: int | None = None
    for work in group:
        weight = flat_view(work.parameter)
        start = work.done
        while start < weight.numel():
            unit, end = store.unit(work, start)
            if batch and unit != current:
                yield batch
                batch = []
            current = unit
            batch.append(Part(work, start, end - start, weight[start:end]))
            start = end
    if batch:
        yield batch


def batches(
    works: Iterable[list[Work]], store: StateStore, slot_bytes: int
) -> Iterator[list[tuple[Work, Piece]]]:
    """Pieces packed into slots; a batch has parameters of one of the lists."""
    for group in works:
        batch: list[tuple[Work, Piece]] = []
        used = 0
        current: int | None = None
        for work in group:
            weight = flat_view(work.parameter)
            gradient = work.gradient if work.pending is not None else flat_view(work.gradient)
            start = work.done
            while start < weight.numel():
                unit, end = store.unit(work, start)
                if batch and unit != current:
                    yield batch
                    batch, used = [], 0
                current = unit
                piece = cut(
                    weight,
                    gradient,
                    reads_weight=work.reads_weight,
                    slot_bytes=slot_bytes,
                    used_bytes=used,
                    start=start,
                    end=end,
                )
                if piece is None or (batch and batch[-1][0] is work):
                    # A batch has one piece of a parameter.
                    yield batch
                    batch, used = [], 0
                    continue
                batch.append((work, piece))
                used = end_of(piece)
                start += piece.count
        if batch:
            yield batch


def check_parameter(parameter: torch.Tensor, name: str) -> None:
    """Raise ConfigError, saying why, for a parameter that optimizer ``name`` cannot update."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(parameter, distributed.DTensor):
        _refuse(
            parameter,
            name,
            "is a DTensor, as of FSDP2 and tensor parallelism, of which this process has a part; "
            "use torch's optimizer",
        )
    if parameter.dtype not in _DTYPES:
        _refuse(parameter, name, f"is {parameter.dtype}; it must be float32, bfloat16 or float16")
    if parameter.layout is not torch.strided or parameter.device.type not in ("cpu", "cuda"):
        where = f"{parameter.layout} on {parameter.device}"
        _refuse(parameter, name, f"is {where}; it must be dense on CUDA or the CPU")
    if not is_dense(parameter):
        _refuse(parameter, name, "has gaps in memory; make it contiguous")


def check_gradient(parameter: torch.Tensor, gradient: torch.Tensor, name: str) -> None:
    """Raise ConfigError, saying why, for a gradient that cannot be used."""
    shape = tuple(parameter.shape)
    if gradient.layout is not torch.strided:
        raise ConfigError(
            f"{name} does not take {gradient.layout} gradients (parameter of shape {shape}); use "
            "sparse=False in the embedding"
        )
    if gradient.dtype not in _DTYPES:
        kind = "complex gradients" if gradient.is_complex() else f"{gradient.dtype} gradients"
        raise ConfigError(
            f"{name} does not take {kind} (parameter of shape {shape}); they must be float32, "
            "bfloat16 or float16"
        )
    if gradient.device != parameter.device or gradient.shape != parameter.shape:
        raise ConfigError(
            f"{name} found a gradient of shape {tuple(gradient.shape)} on {gradient.device} for a "
            f"parameter of shape {shape} on {parameter.device}; they must agree"
        )


def _refuse(parameter: torch.Tensor, name: str, what: str) -> NoReturn:
    shape = tuple(parameter.shape)
    raise ConfigError(f"{name} cannot update a parameter of shape {shape}: it {what}")
