"""Follows a dry run: what each block of memory holds, and what the program does when it asks.

Torch tells of modules, optimizers and failed allocations through hooks; the recorder in the
emulated device's ATen part keeps the blocks (``dry_recorder.hpp``, which has the same numbers).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from spillover.emulator import _libraries
from spillover.emulator._dry_times import StepTimes

#: What a block holds, by the recorder's number; 0 is what nobody said anything of.
KINDS = ("", "parameters", "buffers", "gradients", "optimizer state", "workspace")
_PARAMETERS, _BUFFERS, _GRADIENTS, _STATE = 1, 2, 3, 4
PHASES = ("forward", "backward", "optimizer step")
_OPTIMIZER_PHASE = 2


class _BlockRow(ctypes.Structure):
    """``spillover_emulator_block`` of the C interface."""

    _fields_ = (
        ("number", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("site", ctypes.c_uint32),
        ("forward_site", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("phase", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("operator_name", ctypes.c_char_p),
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block that was alive at the peak.

    ``forward_stack`` is set where a backward pass allocated on a thread of torch's own: the stack
    of the forward operator that it worked for.
    """

    number: int
    size_bytes: int
    stack: tuple[str, ...]
    forward_stack: tuple[str, ...]
    step: int
    phase: str
    kind: str
    operator: str


@dataclass(frozen=True, kw_only=True)
class FailedAllocation:
    """The first allocation that did not fit."""

    device: int
    requested_bytes: int
    free_bytes: int
    capacity_bytes: int
    step: int


class PeakCounts(NamedTuple):
    """The most that torch's allocator has handed out and held, each at its own moment."""

    allocated_bytes: int
    reserved_bytes: int


class Records:
    """What is known of one process's dry run. Made once torch is imported; any thread may use it.

    Parameters
    ----------
    library
        Path of the emulated device's ATen part.
    times
        Notes when steps end; None without a clock.
    """

    def __init__(self, library: str, times: StepTimes | None) -> None:
        self._lock = threading.Lock()
        self._modules: weakref.WeakSet[Any] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._step = 1
        self._steps_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.times = times
        self.failure: FailedAllocation | None = None
        self._peaks_before_reset: dict[int, PeakCounts] = {}
        self._library = ctypes.CDLL(library)
        self._library.spillover_emulator_recorder_phase.argtypes = [ctypes.c_int, ctypes.c_uint]
        self._library.spillover_emulator_recorder_tag.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        self._library.spillover_emulator_recorder_freeze.argtypes = [ctypes.c_int]
        peak = self._library.spillover_emulator_recorder_peak
        peak.restype = ctypes.c_size_t
        peak.argtypes = [ctypes.c_int, ctypes.POINTER(_BlockRow), ctypes.c_size_t]

    def watch(self, torch: Any) -> None:
        """Attach to torch's hooks, once."""
        modules = importlib.import_module("torch.nn.modules.module")
        modules.register_module_parameter_registration_hook(self._on_registration)
        modules.register_module_buffer_registration_hook(self._on_registration)
        optimizers = importlib.import_module("torch.optim.optimizer")
        optimizers.register_optimizer_step_pre_hook(self._before_step)
        optimizers.register_optimizer_step_post_hook(self._after_step)
        self._watch_moves(torch.nn.Module)
        self._watch_resets(torch)
        if self.times is not None:
            self.times.watch(torch)
        torch.cuda._lazy_call(self._start)
        torch.cuda._lazy_call(
            lambda: torch._C._cuda_attach_out_of_memory_observer(self._on_out_of_memory)
        )

    def _watch_moves(self, module_class: Any) -> None:
        """``Module.cuda()`` and its like give parameters new memory and call no hook."""
        original = module_class._apply

        @functools.wraps(original)
        def apply(module: Any, *arguments: Any, **options: Any) -> Any:
            result = original(module, *arguments, **options)
            self._tag_module(module)
            return result

        module_class._apply = apply

    def _watch_resets(self, torch: Any) -> None:
        """A program that measures its own peaks leaves only the last one in torch's statistics."""
        for name in ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats"):
            original = getattr(torch._C, name)

            @functools.wraps(original)
            def reset(device: int, original: Any = original) -> None:
                self._peaks_before_reset[device] = self.peak_counts(device)
                original(device)

            setattr(torch._C, name, reset)

    def peak_counts(self, device: int) -> PeakCounts:
        """The most of the whole run, whatever the program reset."""
        import torch

        stats = torch.cuda.memory_stats(device)
        before = self._peaks_before_reset.get(device, PeakCounts(0, 0))
        return PeakCounts(
            allocated_bytes=max(before.allocated_bytes, stats.get("allocated_bytes.all.peak", 0)),
            reserved_bytes=max(before.reserved_bytes, stats.get("reserved_bytes.all.peak", 0)),
        )

    @property
    def step(self) -> int:
        """Number of the training step that the program is in."""
        return self._step

    def tag(self) -> None:
        """Say of all that modules and optimizers hold what it is."""
        with self._lock:
            modules, optimizers = list(self._modules), list(self._optimizers)
        for module in modules:
            self._tag_module(module)
        for optimizer in optimizers:
            self._tag_optimizer(optimizer)

    def peak(self, device: int) -> list[Block]:
        """The blocks that were alive when most memory was allocated, largest first."""
        self.tag()
        function = self._library.spillover_emulator_recorder_peak
        count = function(device, None, 0)
        rows = (_BlockRow * count)()
        count = min(count, function(device, rows, count))
        stacks: dict[int, tuple[str, ...]] = {}
        blocks = []
        for row in rows[:count]:
            for site in (row.site, row.forward_site):
                if site not in stacks:
                    stacks[site] = _stack(site)
            blocks.append(
                Block(
                    number=row.number,
                    size_bytes=row.size_bytes,
                    stack=stacks[row.site],
                    forward_stack=stacks[row.forward_site],
                    step=row.step,
                    phase=PHASES[row.phase],
                    kind=KINDS[row.kind],
                    operator=(row.operator_name or b"").decode(),
                )
            )
        return sorted(blocks, key=lambda block: -block.size_bytes)

    def _start(self) -> None:
        self._library.spillover_emulator_recorder_start()

    def _on_registration(self, module: Any, name: str, value: Any) -> None:
        with self._lock:
            self._modules.add(module)
        self._tag(value, _PARAMETERS if name in module._parameters else _BUFFERS)

    def _before_step(self, optimizer: Any, arguments: Any, options: Any) -> None:
        with self._lock:
            self._optimizers.add(optimizer)
        self.tag()
        self._library.spillover_emulator_recorder_phase(_OPTIMIZER_PHASE, self._step)

    def _after_step(self, optimizer: Any, arguments: Any, options: Any) -> None:
        self._tag_optimizer(optimizer)
        made = self._steps_made.get(optimizer, 0) + 1
        self._steps_made[optimizer] = made
        self._step = max(self._step, made + 1)
        if self.times is not None:
            self.times.end_step(made)
        self._library.spillover_emulator_recorder_phase(0, self._step)

    def _on_out_of_memory(self, device: int, requested: int, total: int, free: int) -> None:
        if self.failure is not None:
            return
        if not self._library.spillover_emulator_recorder_freeze(device):
            return
        self.failure = FailedAllocation(
            device=device,
            requested_bytes=requested,
            free_bytes=free,
            capacity_bytes=total,
            step=self._step,
        )
        # While the program unwinds its tensors are freed, and nobody could say what they were.
        self.tag()

    def _tag_module(self, module: Any) -> None:
        for parameter in module._parameters.values():
            self._tag_parameter(parameter)
        for buffer in module._buffers.values():
            self._tag(buffer, _BUFFERS)

    def _tag_optimizer(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._tag_parameter(parameter)
        # Not through the properties and methods of a derived class: optimizers of ours wait for
        # updates that are under way, or for state that is on its way off the device.
        states: dict[Any, Any] = vars(optimizer).get("state", {})
        for state in dict.values(states):
            if isinstance(state, dict):
                for value in dict.values(state):
                    self._tag(value, _STATE)

    def _tag_parameter(self, parameter: Any) -> None:
        if parameter is not None:
            self._tag(parameter, _PARAMETERS)
            with _plain_tensors():
                gradient = parameter.grad
            self._tag(gradient, _GRADIENTS)

    def _tag(self, tensor: Any, kind: int) -> None:
        try:
            with _plain_tensors() as tensor_class:
                if not isinstance(tensor, tensor_class) or not tensor.is_cuda:
                    return
                address = tensor_class.untyped_storage(tensor).data_ptr()
                device = tensor.device.index
        except (NotImplementedError, RuntimeError):
            return  # sparse, or a subclass without a storage of its own
        if address:
            self._library.spillover_emulator_recorder_tag(device, address, kind)


@contextlib.contextmanager
def _plain_tensors() -> Iterator[Any]:
    """Have tensors of derived classes answer without the class: torch's own, which it yields.

    Asked for its address, a gradient that is off the device would come back to it, and a weight
    that is being updated would wait for that.
    """
    import torch

    with torch._C.DisableTorchFunctionSubclass():
        yield torch.Tensor


def _stack(site: int) -> tuple[str, ...]:
    function = _libraries.driver().spillover_emulator_describe_site
    length = function(site, None, 0)
    buffer = ctypes.create_string_buffer(length + 1)
    function(site, buffer, length + 1)
    return tuple(line.strip() for line in buffer.value.decode(errors="replace").splitlines())
