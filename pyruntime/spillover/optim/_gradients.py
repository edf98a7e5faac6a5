"""Gradients leave the device as backward makes them.

Note [When gradients leave]
---------------------------
A post-accumulate hook of each parameter starts the copy as soon as autograd has summed its
gradient, and puts a placeholder in its place (Note [Placeholders]). Later micro-steps add to the
placeholder, which is autograd's own path.

What somebody needs on the device during backward stays until backward ends: DDP reads ``.grad``
in hooks that run after ours, and writes the average to it in a callback at the end. Ours is queued
from within a callback, so it comes after those. In ``no_sync()`` DDP needs nothing, so gradients
leave at once and add up on the host; the backward that reduces brings the sum back to the device,
where the gradient is added and reduced. DDP is looked for when gradients are first offloaded and
when a gradient was read in backward; who else reads one has it stay from the next backward on. The
first time costs a fetch. Nothing is ever wrong, since placeholders tell the truth.

With ``create_graph=True`` gradients have a graph of their own, and stay on the device.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spillover._backward_end import queue_backward_end
from spillover._core import HostPool
from spillover._errors import ConfigError, HostOutOfMemory, NonFiniteGradient
from spillover._layout import dense_stride
from spillover._reclaim import offer
from spillover._settings import enabled, logger
from spillover._sources import register
from spillover._stalls import Timed
from spillover._transfer import TransferEngine
from spillover._units import format_bytes, parse_bytes
from spillover.optim._gradient_memory import MemoryOfParameter
from spillover.optim._gradient_placeholder import OffloadedGradient, host_of
from spillover.optim._gradient_sharing import is_shared_gradient, measure
from spillover.optim._gradient_worker import worker
from spillover.optim._host_gradient import GRADIENT_DTYPES, HostGradient, Place, are_finite

Anomalies = Literal["raise", "warn"]

_INFLIGHT_BYTES = 256 << 20
_DEVICE_SHARE = 16
_NO_GRAPH_TASK = -1
# Parameters that a message names.
_NAMED_MAX = 8

_LEAVE = Timed("gradients", "leave")


@dataclass(frozen=True, kw_only=True)
class GradientStats:
    """Figures of one :func:`offload_gradients`.

    Attributes
    ----------
    left, left_bytes
        Gradients that left the device since the start.
    added_bytes
        Of them, those that were added to what the host had: micro-steps after the first.
    fetched, fetched_bytes
        Gradients that something wanted on the device again.
    late
        Gradients that left when their backward was over, such as after a reduction.
    host_bytes
        Pinned memory for gradients at this moment, without the ring (64 to 512 MiB) that the
        process has from the first micro-step on that was added.
    parameters
        With a hook.
    """

    left: int
    left_bytes: int
    added_bytes: int
    fetched: int
    fetched_bytes: int
    late: int
    host_bytes: int
    parameters: int


@dataclass(kw_only=True)
class _Counters:
    left: int = 0
    left_bytes: int = 0
    added_bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    late: int = 0


class _Shared:
    """What the parameters of one handle share; lives as long as any gradient of theirs."""

    def __init__(self, pool: HostPool | None, inflight_bytes: int | None) -> None:
        self.pool = pool
        self.counters = _Counters()
        self._inflight_bytes = inflight_bytes
        self.lock = threading.RLock()
        self._engines: dict[int, TransferEngine] = {}
        self._process = os.getpid()
        self._parts: weakref.WeakSet[_Parameter] = weakref.WeakSet()
        self._has_searched = False

    def find_ddp(self, parts: Iterable[_Parameter]) -> None:
        """Know who reduces the gradients of ``parts``, and of those from now on."""
        fresh = list(parts)
        self._parts.update(fresh)
        _find_ddp(fresh)

    def find_ddp_of_all(self) -> None:
        """The same for all parts, once: searching takes long."""
        if not self._has_searched:
            self._has_searched = True
            _find_ddp([part for part in self._parts if part.ddp is None])

    def engine(self, device: torch.device) -> TransferEngine:
        with self.lock:
            if self._process != os.getpid():
                self._engines, self._process = {}, os.getpid()
            engine = self._engines.get(device.index)
            if engine is None:
                inflight_bytes = self._inflight_bytes
                if inflight_bytes is None:
                    total_bytes = torch.cuda.get_device_properties(device).total_memory
                    inflight_bytes = min(_INFLIGHT_BYTES, total_bytes // _DEVICE_SHARE)
                engine = TransferEngine(device=device, pool=self.pool, inflight=inflight_bytes)
                self._engines[device.index] = engine
                offer(device, self)
            return engine

    def engines(self) -> list[TransferEngine]:
        with self.lock:
            return list(self._engines.values()) if self._process == os.getpid() else []

    def give_back(self, missing_bytes: int, device: torch.device) -> int:
        """See ``_reclaim.Holder``: memory of gradients that are on their way out."""
        engine = self._engines.get(device.index)
        return engine.collect(wait=True) if engine is not None else 0


class _Parameter:
    """One parameter's part: the ``Owner`` of its gradients."""

    def __init__(self, shared: _Shared, parameter: torch.Tensor, name: str) -> None:
        self.name = name
        self.memory = MemoryOfParameter(shared.pool)
        self.shared = shared
        self.reference = weakref.ref(parameter)
        self.ddp: weakref.ref[Any] | None = None
        self.is_read_in_backward = False

    def engine(self, device: torch.device) -> TransferEngine:
        return self.shared.engine(device)

    def stays_in_backward(self) -> bool:
        if torch._C._current_graph_task_id() == _NO_GRAPH_TASK:
            return False
        ddp = self.ddp() if self.ddp is not None else None
        if ddp is not None:
            return bool(ddp.require_backward_grad_sync)
        return self.is_read_in_backward

    def was_read_in_backward(self) -> None:
        if not self.is_read_in_backward:
            self.is_read_in_backward = True
            self.shared.find_ddp_of_all()

    def count(self, *, left_bytes: int = 0, added_bytes: int = 0, fetched_bytes: int = 0) -> None:
        counters = self.shared.counters
        with self.shared.lock:
            counters.left += bool(left_bytes)
            counters.left_bytes += left_bytes
            counters.added_bytes += added_bytes
            counters.fetched += bool(fetched_bytes)
            counters.fetched_bytes += fetched_bytes

    def send(self, parameter: torch.Tensor) -> None:
        """Have the gradient leave, and a placeholder be in its place."""
        assert parameter.grad is not None
        # In a list alone, since references to it are counted.
        gradient = [parameter.grad]
        is_shared = is_shared_gradient(gradient)
        host = HostGradient(
            self, parameter.shape, dense_stride(parameter), gradient[0].dtype, gradient[0].device
        )
        host.assign(gradient[0], is_shared=is_shared)
        parameter.grad = OffloadedGradient(host)


def offload_gradients(
    parameters: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    accumulates: bool = False,
    anomalies: Anomalies | None = None,
    inflight: int | str | None = None,
    pool: HostPool | None = None,
) -> OffloadedGradients:
    """Have the gradients of parameters leave the device as backward makes them.

    Each one is copied to pinned memory beside backward, its device memory goes when the copy is
    over, and ``.grad`` is a placeholder from then on: a tensor without memory, whose norm, scaling
    and zeroing work on the host, and which any other operator gets as the gradient that it is. So
    torch's clipping, GradScaler, ``zero_grad()`` and DDP work as before. Micro-steps add up on the
    host, in float32.

    Parameters
    ----------
    parameters
        ``model.parameters()``, or ``model.named_parameters()`` for names in errors. Gradients of
        float32, bfloat16, float16 and float64 on CUDA devices leave; others stay where they are.
    accumulates
        There will be several micro-steps a step: float32 memory is pinned now rather than when the
        second one comes.
    anomalies
        What :meth:`OffloadedGradients.check` does about NaN and infinity: ``"raise"``, ``"warn"``
        or, by default, nothing.
    inflight
        The most device memory that gradients on their way out may hold, such as ``"256MiB"``, which
        is the default on all but small devices. Backward waits beyond that.
    pool
        Where pinned memory comes from, by default the process's pool.

    Returns
    -------
    A handle; ``remove()`` ends it. It must be kept: with it the hooks go.

    Raises
    ------
    ConfigError
        An argument is wrong.
    HostOutOfMemory
        There is no pinned memory for the gradients; the message has the bytes. Nothing is changed.

    Notes
    -----
    Blocks the host while memory is pinned. Pinned memory is 2 bytes a half-precision parameter with
    one micro-step a step, and 4 with several; 4 a float32 one; and with several 64 to 512 MiB a
    process.

    A gradient is copied after the work of the stream that made it, and read by operators on the
    current stream, as any gradient. ``torch.autograd.grad`` is not touched, nor are gradients with
    ``create_graph=True``, of captured CUDA graphs, sparse or complex ones.

    Examples
    --------
    >>> handle = spillover.optim.offload_gradients(model.named_parameters())
    >>> loss.backward()
    >>> spillover.optim.clip_grad_norm_(model.parameters(), 1.0)
    """
    if anomalies not in (None, "raise", "warn"):
        raise ConfigError(f"anomalies={anomalies!r} is not known; write 'raise', 'warn' or None")
    if isinstance(parameters, torch.Tensor):
        raise ConfigError("parameters must be several, such as model.parameters(), not one tensor")
    named = []
    for number, entry in enumerate(parameters):
        name, parameter = entry if isinstance(entry, tuple) else (f"parameter {number}", entry)
        if not isinstance(parameter, torch.Tensor):
            raise ConfigError(f"{name!r} is a {type(parameter).__name__}, not a parameter")
        named.append((name, parameter))
    return OffloadedGradients(
        named if enabled() else [],
        pool=pool,
        inflight_bytes=None if inflight is None else parse_bytes(inflight, name="inflight"),
        accumulates=accumulates,
        anomalies=anomalies,
    )


class OffloadedGradients:
    """Made by :func:`offload_gradients`. Also a context manager, which removes the hooks."""

    def __init__(
        self,
        parameters: list[tuple[str, torch.Tensor]],
        *,
        pool: HostPool | None,
        inflight_bytes: int | None,
        accumulates: bool,
        anomalies: Anomalies | None,
    ) -> None:
        self._shared = _Shared(pool, inflight_bytes)
        self._known: dict[int, _Parameter] = {}
        self._handles: dict[int, Any] = {}
        self._accumulates = accumulates
        self.anomalies = anomalies
        self._waiting: dict[int, _Parameter] = {}  # For the end of a backward.
        self._queued_task = _NO_GRAPH_TASK
        self.add(parameters)
        register("gradients", self, OffloadedGradients.stats)

    def add(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Offload the gradients of more parameters; those that are known are left alone.

        Those that require no gradient now are taken when this is called after they do.

        Raises
        ------
        HostOutOfMemory
            There is no memory for their gradients; none of them is added.
        """
        fresh = []
        for name, parameter in parameters:
            known = self._known.get(id(parameter))
            if known is not None and known.reference() is parameter:
                continue
            if parameter.requires_grad and parameter.is_leaf and parameter.numel() > 0:
                fresh.append((_Parameter(self._shared, parameter, name), parameter))
        self._reserve(fresh)
        for part, parameter in fresh:
            hook = functools.partial(_hook, weakref.ref(self), part)
            register_hook: Any = parameter.register_post_accumulate_grad_hook
            self._handles[id(parameter)] = register_hook(hook)
            self._known[id(parameter)] = part
        self._shared.find_ddp([part for part, _ in fresh])

    def remove(self) -> None:
        """Have gradients stay on the device from now on.

        Those that are on the host stay there, and can be read. May be called again.
        """
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._known.clear()

    def check(self) -> None:
        """Look for gradients with NaN or infinity, as ``anomalies`` says; blocks until it is known.

        Optimizers of this package that were told to offload gradients call it before they change
        anything.

        Raises
        ------
        NonFiniteGradient
            There are some, and ``anomalies`` is ``"raise"``.
        """
        if self.anomalies is None:
            return
        hosts = list(self._hosts())
        bad = [host for host, good in zip(hosts, are_finite(hosts), strict=True) if not good]
        if not bad:
            return
        text = _describe(bad)
        if self.anomalies == "raise":
            raise NonFiniteGradient(text)
        logger.warning("%s", text)

    def synchronize(self) -> None:
        """Block the host until every gradient has left and is added up."""
        for host in self._hosts():
            host.wait()
        self.collect()

    def collect(self) -> None:
        """Let go of the device memory of copies that are over. Does not block."""
        for engine in self._shared.engines():
            engine.collect()

    def stats(self) -> GradientStats:
        """Figures at this moment, also in :func:`spillover.stats`. Cheap; does not block."""
        parts = list(self._known.values())
        return GradientStats(
            **vars(self._shared.counters),
            host_bytes=sum(part.memory.host_bytes() for part in parts),
            parameters=len(parts),
        )

    def __enter__(self) -> OffloadedGradients:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __del__(self) -> None:
        # Gradients stay where they are; nothing more leaves.
        for handle in getattr(self, "_handles", {}).values():
            handle.remove()

    # ---- hooks ---------------------------------------------------------------------------------

    def _hosts(self) -> Iterator[HostGradient]:
        for part in list(self._known.values()):
            parameter = part.reference()
            host = host_of(parameter.grad) if parameter is not None else None
            if host is not None:
                yield host

    def _reserve(self, fresh: list[tuple[_Parameter, torch.Tensor]]) -> None:
        on_device = [(part, parameter) for part, parameter in fresh if parameter.is_cuda]
        for part, _ in on_device:
            part.memory.accumulates = self._accumulates
        if on_device:
            measure()
            worker.start()
            worker.expect(max(parameter.nbytes for _, parameter in on_device))
        try:
            for part, parameter in on_device:
                if parameter.dtype in GRADIENT_DTYPES:
                    part.memory.reserve(parameter.numel(), parameter.dtype)
            if self._accumulates and on_device:
                worker.reserve()
        except HostOutOfMemory as error:
            wanted_bytes = sum(
                part.memory.size_bytes(parameter.numel(), parameter.dtype)
                for part, parameter in on_device
            )
            raise HostOutOfMemory(
                f"gradients of {len(on_device)} parameters need {format_bytes(wanted_bytes)} of "
                f"pinned host memory: {error}"
            ) from error

    def _at_end(self, parts: _Parameter) -> None:
        self._waiting[id(parts)] = parts
        task = torch._C._current_graph_task_id()
        if task != self._queued_task:
            self._queued_task = task
            # From a callback, so that it comes after those that were queued in backward.
            queue_backward_end(lambda: queue_backward_end(self._end))

    @torch.no_grad()
    def _end(self) -> None:
        self._queued_task = _NO_GRAPH_TASK
        waiting, self._waiting = self._waiting, {}
        for part in waiting.values():
            parameter = part.reference()
            if parameter is not None and _can_leave(parameter.grad):
                self._shared.counters.late += 1
                part.send(parameter)


def _describe(bad: list[HostGradient]) -> str:
    """Names of the parameters, and what is wrong."""
    names = []
    for host in bad[:_NAMED_MAX]:
        kinds = [
            kind
            for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf))
            if bool(host.on_host(test).any())
        ]
        names.append(f"{host.owner.name} ({' and '.join(kinds)})")
    more = f" and {len(bad) - _NAMED_MAX} more" if len(bad) > _NAMED_MAX else ""
    return f"gradients are not finite: {', '.join(names)}{more}"


def _hook(reference: weakref.ref[OffloadedGradients], part: _Parameter, parameter: Any) -> None:
    handle = reference()
    if handle is None:
        return
    host = host_of(parameter.grad)
    if host is not None and part.stays_in_backward() and host.place is Place.DEVICE:
        parameter.grad = host.on_device  # For who reads it now, such as DDP.
    if not _can_leave(parameter.grad):
        return
    if part.stays_in_backward():
        handle._at_end(part)
    else:
        _LEAVE.call(functools.partial(part.send, parameter))


def _can_leave(gradient: torch.Tensor | None) -> bool:
    return (
        gradient is not None
        and type(gradient) is torch.Tensor
        and gradient.is_cuda
        and gradient.layout is torch.strided
        and gradient.dtype in GRADIENT_DTYPES
        and gradient.numel() > 0
        and not gradient.requires_grad
        and not torch.cuda.is_current_stream_capturing()
    )


def _find_ddp(parts: list[_Parameter]) -> None:
    """Find the DistributedDataParallel that reduces the gradients of ``parts``, if there is one.

    It leaves no mark on parameters, so all objects are looked through, once: when gradients are
    first offloaded, if the program is distributed, and when something read them in backward.
    """
    distributed = sys.modules.get("torch.distributed")
    if not parts or distributed is None or not distributed.is_initialized():
        return
    from torch.nn.parallel import DistributedDataParallel

    by_parameter = {id(part.reference()): part for part in parts}
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel):
            for parameter in found.parameters():
                part = by_parameter.get(id(parameter))
                if part is not None:
                    part.ddp = weakref.ref(found)
