"""Carries the gradients of streamed weights from the device to ``.grad`` of the host Parameters.

A gradient leaves as soon as autograd has summed it (a post-accumulate hook on the device leaf) on
the copy-out stream, and is handed over when its copy has completed: during backward when many are
under way, and all of them before ``backward()`` returns. So whatever reads ``.grad`` after backward
(``clip_grad_norm_``, GradScaler, any CPU optimizer) reads finished values without knowing of us.

Only autograd's thread uses the queue during backward, and outside of it only the thread that called
``backward()``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from spillover._core import TraceLabel
from spillover._errors import StateError
from spillover._pinned import empty_pinned
from spillover._settings import logger
from spillover._stalls import Stall
from spillover._streams import copy_streams, new_event
from spillover.hooks._parameters_block import StreamedBlock, StreamedWeight

_GRADIENT = TraceLabel("weights: gradient", "copy")
_COPIES_OUT = Stall("weights", "gradients to leave")


@dataclass(eq=False)
class _Leaving:
    """A gradient under way; ``source`` keeps the device memory until the copy has completed."""

    weight: StreamedWeight
    source: torch.Tensor
    target: torch.Tensor
    staging: torch.Tensor | None
    copied: torch.cuda.Event


class GradientQueue:
    """Gradients under way to the host, oldest first: ``inflight_bytes_max`` and one more."""

    def __init__(self, device: torch.device, inflight_bytes_max: int) -> None:
        self._device = device
        self._inflight_bytes_max = inflight_bytes_max
        self._streams = copy_streams(device)
        self._leaving: deque[_Leaving] = deque()
        self._inflight_bytes = 0
        self._events: list[torch.cuda.Event] = []
        self._staging: dict[int, list[torch.Tensor]] = {}
        self.copied_bytes = 0

    def send(self, block: StreamedBlock, weight: StreamedWeight) -> None:
        """Take the leaf's gradient and start its copy to the host.

        Runs inside of backward, on the stream on which the gradient was summed.
        """
        gradient = weight.leaf.grad
        if gradient is None:
            return
        weight.leaf.grad = None
        if gradient.requires_grad:
            raise StateError(
                f"backward(create_graph=True) reached the streamed weight {weight.name!r}; a "
                "gradient that leaves the device cannot be differentiated again"
            )
        if gradient.layout is not torch.strided:
            raise StateError(
                f"the gradient of the streamed weight {weight.name!r} is {gradient.layout}; use "
                "sparse=False in the embedding, or leave its module out of blocks="
            )
        source = gradient.detach()
        if tuple(source.stride()) != weight.stride:
            # Rearranged here, on the compute stream, so that the copy is one plain transfer.
            source = torch.empty_strided(
                source.shape, weight.stride, dtype=source.dtype, device=source.device
            ).copy_(source)
        target, staging = self._target(block, weight)
        copied = self._events.pop() if self._events else new_event()
        copy_out = self._streams.copy_out
        copy_out.wait_stream(torch.cuda.current_stream(self._device))
        with self._streams.copying_out(_GRADIENT, source.nbytes):
            target.copy_(source, non_blocking=True)
        copied.record(copy_out)
        weight.gradients_pending += 1
        self._inflight_bytes += source.nbytes
        self.copied_bytes += source.nbytes
        self._leaving.append(_Leaving(weight, source, target, staging, copied))
        while self._inflight_bytes > self._inflight_bytes_max and len(self._leaving) > 1:
            self._deliver(self._leaving.popleft())

    def _target(
        self, block: StreamedBlock, weight: StreamedWeight
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if weight.parameter.grad is None and not weight.gradients_pending:
            return block.gradient_target(weight), None
        # A sum is already there: the new part goes through staging and is added by the CPU.
        free = self._staging.get(weight.size_bytes)
        staging = free.pop() if free else empty_pinned((weight.size_bytes,), torch.uint8)
        return weight.over(staging.numpy()), staging

    def _deliver(self, item: _Leaving) -> None:
        """Wait for one copy and hand the gradient to the host Parameter."""
        _COPIES_OUT.wait(item.copied.synchronize)
        self._retire(item)
        parameter = item.weight.parameter
        with torch.no_grad():
            if parameter.grad is None:
                parameter.grad = item.target if item.staging is None else item.target.clone()
            else:
                parameter.grad.add_(item.target)
        self._recycle(item)
        hooks = parameter._post_accumulate_grad_hooks
        for hook in list(hooks.values()) if hooks else ():
            hook(parameter)

    def _retire(self, item: _Leaving) -> None:
        self._inflight_bytes -= item.source.nbytes
        item.weight.gradients_pending -= 1
        self._events.append(item.copied)

    def _recycle(self, item: _Leaving) -> None:
        if item.staging is not None:
            self._staging.setdefault(item.weight.size_bytes, []).append(item.staging)

    def deliver_all(self) -> None:
        """Hand over everything that is under way; the host waits for the copies."""
        while self._leaving:
            self._deliver(self._leaving.popleft())

    def events(self) -> tuple[object, object]:
        """The containers of all events, spare and under way, for who must outlive the queue."""
        return self._events, self._leaving

    def discard(self) -> None:
        """Drop what a backward that raised left behind, once its copies have completed."""
        if self._leaving:
            logger.warning(
                "a backward did not complete; %d gradients of streamed weights that it had not "
                "handed over are dropped, such as that of %r",
                len(self._leaving),
                self._leaving[0].weight.name,
            )
        while self._leaving:
            item = self._leaving.popleft()
            item.copied.synchronize()
            self._retire(item)
            self._recycle(item)

    def release(self) -> None:
        """Give the staging memory back; nothing may be under way."""
        self._staging.clear()
        self._events.clear()
