"""Brings the weights of streamed blocks to the device before they are used, and drops them after.

Note [Streamed weights]
-----------------------
Where a weight's ``data`` lives, and what autograd may hold, decides everything else. Three ways
were compared:

*Swap ``Parameter.data`` between host and device.* Users, optimizers and ``state_dict`` would see
whichever side happens to be there, and AccumulateGrad would meet a device gradient for a Parameter
that is back on the host.

*One device storage a weight, resized to zero when it is not needed* (as FSDP does). Saved tensors
stay valid without hooks, but the Parameters are empty device tensors, so every optimizer and
``clip_grad_norm_`` on the host needs special handling. And if backward reaches a block by another
way than through its outputs (a loss kept in an attribute), a kernel reads a null pointer.

*A device leaf beside the host Parameter*, which we use. The Parameter is an ordinary pinned CPU
tensor for good: torch's CPU optimizers, clipping, GradScaler, schedulers, checkpoints and ours work
on it and on its CPU ``.grad`` as on any CPU model. While a block runs, operators find a leaf on the
device instead; autograd sums the leaf's gradient on the device exactly as it would for an
all-resident weight (same node, same order, so the same bits), and the sum then leaves for the host.
The leaf object is one and the same for good, but its ``data`` is a view of the block's device copy
only while the block is installed. Weights saved by autograd are caught by saved-tensor hooks, which
fetch at the very point of use. Nothing depends on guessing right when backward is done with a
block: a wrong guess costs a second copy, never a wrong value. Code that keeps a saved weight in
another way (``ctx.weight = weight``) holds the leaf, which reads the weight while the block is
installed and NaN otherwise.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from spillover._backward_end import queue_backward_end
from spillover._errors import StateError
from spillover.hooks._parameters_block import StreamedBlock, StreamedWeight
from spillover.hooks._parameters_copies import DeviceCopies
from spillover.hooks._parameters_gradients import GradientQueue
from spillover.hooks._parameters_order import BlockOrder
from spillover.hooks._parameters_saved import SavedWeight, SavedWeightHooks

_NO_GRAPH_TASK = -1

# After a backward that raised, autograd's threads let go of it a moment later than its caller.
_UNWIND_S_MAX = 0.2


@dataclass(frozen=True)
class _Call:
    """A call of a block's forward that has not returned."""

    block: StreamedBlock
    hooks: SavedWeightHooks


# What forked children hold until they end: destroying a CUDA event there ends the process.
_inherited: list[object] = []


def _synchronize(device: torch.device, owner: int, *events: object) -> None:
    """Wait for the device, unless this is a forked child, which has none and started nothing."""
    if os.getpid() == owner:
        torch.cuda.synchronize(device)
    else:
        _inherited.extend(events)


class WeightStreamer:
    """Owns the device copies of a model's streamed blocks. Used by one host thread at a time.

    Optimizers may step in any thread at any time: ``host_may_write`` looks before it touches. Which
    thread runs the model's forward is not known, so a step of the model's own optimizer during it
    is taken for one inside of it.
    """

    def __init__(self, device: torch.device, blocks: list[StreamedBlock], prefetch: int) -> None:
        self.device = device
        self.blocks = blocks
        self.closed = False
        self.copies = DeviceCopies(device, blocks, prefetch)
        self._prefetch = prefetch
        self._order = BlockOrder(blocks)
        self._calls: list[_Call] = []
        self._graph_tasks: list[int] = []
        # The end callbacks of backwards that have not ended; autograd alone holds them, so one dies
        # with its backward, also if that raised.
        self._backwards: weakref.WeakSet[functools.partial[None]] = weakref.WeakSet()
        self._parameter_ids = frozenset(
            id(weight.parameter) for block in blocks for weight in block.weights
        )
        self._model_running = False
        largest = max((block.size_bytes for block in blocks), default=0)
        self.gradients = GradientQueue(device, largest)
        # A model may be dropped while copies are under way, after an exception say; its memory must
        # not be given out again before they are complete. At exit nothing is given out any more.
        events = [[block.ready for block in blocks], *self.gradients.events()]
        weakref.finalize(self, _synchronize, device, os.getpid(), *events).atexit = False
        self._leaf_hooks = [
            self._watch(block, weight)
            for block in blocks
            for weight in block.weights
            if weight.leaf.is_floating_point() or weight.leaf.is_complex()
        ]

    def _watch(self, block: StreamedBlock, weight: StreamedWeight) -> Any:
        """Have the leaf's gradient leave once autograd has summed it; also if it thaws later."""
        # Weak: the collector of cycles does not see a tensor's hooks, so a model that is dropped
        # without remove() would never go.
        streamer, of_block, of_weight = weakref.ref(self), weakref.ref(block), weakref.ref(weight)

        def ready(leaf: torch.Tensor) -> None:
            alive, its_block, its_weight = streamer(), of_block(), of_weight()
            if alive is None or its_block is None or its_weight is None:
                raise StateError(
                    "a model whose weights are streamed was dropped before its backward; keep the "
                    "model or its handle until then"
                )
            alive._gradient_ready(its_block, its_weight, leaf)

        frozen = not weight.leaf.requires_grad
        weight.leaf.requires_grad_(True)
        handle = weight.leaf.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]
        if frozen:
            weight.leaf.requires_grad_(False)
        return handle

    # ---- the model's forward -------------------------------------------------------------------

    def model_starts(self) -> None:
        """Begin a forward of the whole model: nothing fetched earlier is trusted."""
        if self._in_backward():
            return
        with _disable_current_modes():
            self.settle()
            self.copies.release_all()
            self._model_running = True
            self._order.new_pass()
            if self._prefetch and self._order.first is not None:
                self.copies.fetch_ahead(self._order.first)

    def model_ends(self) -> None:
        """End a forward of the whole model: no copy reads the host weights any more."""
        if self._in_backward() or not self._model_running:
            return
        self._model_running = False
        self.copies.synchronize()

    # ---- one block's forward -------------------------------------------------------------------

    def block_starts(self, block: StreamedBlock) -> None:
        """Have the block's weights on the device and visible to the operators that follow."""
        if self.closed:
            raise StateError("the model's weights are no longer streamed")
        table = "train" if torch.is_grad_enabled() else "infer"
        with _disable_current_modes():
            if self._in_backward():
                # A recomputation of activation checkpointing.
                table = "backward"
                self._join_backward()
                self.copies.backward_block = block
            elif not self._model_running and not self._calls:
                self.settle()
            block.verify()
            with self.copies.lock:
                self.copies.make_ready(block)
                self.copies.install(block)
                hooks = SavedWeightHooks(self)
                hooks.enter()
                block.depth += 1
            self._calls.append(_Call(block, hooks))
            # Only now: a block that runs is never dropped to make room for the next one.
            self._prefetch_after(block, table)

    def block_ends(self, block: StreamedBlock, output: Any) -> None:
        """Hide the device copy again and have backward announce itself; also after an exception."""
        if not self._calls or self._calls[-1].block is not block:
            return  # The call failed before its weights were installed.
        self._calls.pop().hooks.leave()
        changed = block.changed_inside()
        with self.copies.lock:
            block.depth -= 1
            if block.depth == 0 and not self._in_backward():
                with _disable_current_modes():
                    block.uninstall()
        if torch.is_autocast_enabled(self.device.type) and torch.is_autocast_cache_enabled():
            # The cache would keep a low-precision copy of every block's weights on the device.
            torch.clear_autocast_cache()
        if changed is not None:
            raise StateError(
                f"the forward of block {block.name!r} changed its weight {changed!r} in place; the "
                "change would be lost with the device copy. Change the Parameter outside of forward"
            )
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                reaches = functools.partial(self._backward_reaches, block)
                tensor.register_hook(reaches)  # type: ignore[no-untyped-call]

    # ---- backward ------------------------------------------------------------------------------

    def _backward_reaches(self, block: StreamedBlock, gradient: torch.Tensor) -> None:
        """Runs before the backward of the block's last operator."""
        if self.closed:
            raise StateError(
                f"backward reached block {block.name!r} after its weights ceased to be streamed"
            )
        with _disable_current_modes():
            self._join_backward()
            with self.copies.lock:
                if block is self.copies.backward_block and block.installed and block.is_fresh():
                    self.copies.use(block)
                    return
                self.copies.backward_block = block
                self.copies.make_ready(block)
                self.copies.install(block)
            self._prefetch_after(block, "backward")

    def reload(self, saved: SavedWeight) -> torch.Tensor:
        """A saved view of a weight, on the device again."""
        block = saved.block
        weight = block.weights[saved.weight_index]
        if self.closed:
            raise StateError(f"backward needs {weight.name!r}, which is no longer streamed")
        version = weight.parameter._version
        if version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: streamed weight {weight.name!r} is at version {version}; "
                f"expected version {saved.version} instead."
            )
        with _disable_current_modes(), torch.no_grad():
            if self._in_backward():
                self._join_backward()
            with self.copies.lock:
                self.copies.make_ready(block)
                assert block.buffer is not None
                return block.buffer.view(saved.dtype).as_strided(
                    saved.shape, saved.stride, saved.storage_offset
                )

    def _gradient_ready(
        self, block: StreamedBlock, weight: StreamedWeight, leaf: torch.Tensor
    ) -> None:
        with _disable_current_modes(), torch.no_grad():
            if self._in_backward():
                self._join_backward()
            self.gradients.send(block, weight)

    def _join_backward(self) -> None:
        """Have ``_backward_ends`` called when the present backward is complete."""
        task = torch._C._current_graph_task_id()
        if task not in self._graph_tasks:
            self._graph_tasks.append(task)
            ends = functools.partial(self._backward_ends, task)
            self._backwards.add(ends)
            queue_backward_end(ends)

    def _backward_ends(self, task: int) -> None:
        """Deliver all gradients; runs before ``backward()`` returns to its caller."""
        if task in self._graph_tasks:
            del self._graph_tasks[self._graph_tasks.index(task) :]
        if self._graph_tasks:
            return  # The end of a backward inside of another one (reentrant checkpointing).
        self._backwards.clear()
        with _disable_current_modes():
            self.copies.backward_block = None
            self._order.backward_ended()
            with self.copies.lock:
                for block in self.blocks:
                    if block.depth == 0:
                        block.uninstall()
            self.copies.synchronize()
            self.gradients.deliver_all()

    def _prefetch_after(self, block: StreamedBlock, table: str) -> None:
        self._order.entered(block, table)
        for ahead in self._order.following(block, table, self._prefetch):
            self.copies.fetch_ahead(ahead)

    @staticmethod
    def _in_backward() -> bool:
        return bool(torch._C._current_graph_task_id() != _NO_GRAPH_TASK)

    # ---- order with the host -------------------------------------------------------------------

    def host_may_write(self, param_groups: list[dict[str, Any]]) -> None:
        """Before an optimizer's step: have no copy read the weights that it may write.

        Optimizers of other models step whenever they like, in other threads too, so those that hold
        no streamed weight change nothing here.
        """
        if self.closed or self._in_backward():
            return
        if not any(
            id(parameter) in self._parameter_ids
            for group in param_groups
            for parameter in group["params"]
        ):
            return
        if self._model_running or self._calls:
            self.copies.synchronize()  # A step inside of this model's forward.
        else:
            self.settle()

    def _refuse_foreign_backward(self) -> None:
        """Raise if a backward runs in another thread: its gradients would be lost in silence."""
        deadline = time.monotonic() + _UNWIND_S_MAX
        while self._backwards:
            if time.monotonic() > deadline:
                raise StateError(
                    "the model's backward runs in another thread; run its forward, its optimizer's "
                    "step, synchronize() and remove() after that backward has returned"
                )
            time.sleep(0.001)

    def settle(self) -> None:
        """Outside of forward and backward: finish copies, drop what a failed pass left behind.

        Raises
        ------
        StateError
            The model's backward runs in another thread; nothing has been changed then.
        """
        if self._in_backward():
            return
        self._refuse_foreign_backward()
        while self._calls:
            # Only an exception that skips hooks (KeyboardInterrupt) leaves calls behind.
            call = self._calls.pop()
            call.block.depth = 0
            if call.hooks.is_innermost():
                call.hooks.leave()
        self._model_running = False
        self._graph_tasks.clear()
        self.copies.backward_block = None
        self._order.backward_ended()
        self.gradients.discard()
        with self.copies.lock:
            for block in self.blocks:
                block.uninstall()
        self.copies.synchronize()

    def close(self) -> None:
        """Drop all device copies and hooks on leaves; the host Parameters are ordinary again."""
        if self._calls or self._model_running or self._in_backward():
            raise StateError(
                "the handle was removed while the model's forward or backward runs; if that was "
                "interrupted, call synchronize() first"
            )
        self.settle()
        self.copies.release_all()
        for hook in self._leaf_hooks:
            hook.remove()
        # The handle may live on for long; what it no longer needs should die now.
        self._leaf_hooks.clear()
        self.gradients.release()
        self.blocks.clear()  # One list with that of the copies.
        self._order = BlockOrder([])
        self.closed = True


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors inside a block's output: containers, and objects that hold them as attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for item in vars(value).values():
            yield from _tensors(item)
