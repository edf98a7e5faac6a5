"""Collectives between the devices of one process, in place of NCCL's.

``nn.DataParallel``, ``torch.cuda.comm`` and ``torch.cuda.nccl`` use NCCL where the tensors are on
several GPUs. NCCL runs kernels of its own, which need a GPU; here its bindings are replaced by
copies and additions on the current streams, which the checker sees like any others. Process
groups have no NCCL: use gloo there.

Sums are taken in the order of the devices; NCCL's order depends on its rings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

#: ncclRedOp_t: sum, product, maximum, minimum, average.
_AVERAGE = 4


def replace(torch: Any) -> None:
    """Replace torch's bindings of NCCL.

    Parameters
    ----------
    torch
        The module.
    """
    collectives = Collectives(torch)
    bindings = torch._C
    if not hasattr(bindings, "_nccl_all_reduce"):
        return  # built without NCCL: torch copies by itself
    bindings._broadcast = collectives.broadcast_to
    bindings._broadcast_out = collectives.broadcast_out
    bindings._broadcast_coalesced = collectives.broadcast_coalesced
    bindings._nccl_broadcast = collectives.broadcast
    bindings._nccl_reduce = collectives.reduce
    bindings._nccl_all_reduce = collectives.all_reduce
    bindings._nccl_all_gather = collectives.all_gather
    bindings._nccl_reduce_scatter = collectives.reduce_scatter


class Collectives:
    """What NCCL does, with ordinary operators. Arguments are those of torch's bindings."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._reductions: tuple[Callable[[Any, Any], Any], ...] = (
            torch.add,
            torch.mul,
            torch.maximum,
            torch.minimum,
            torch.add,
        )

    def broadcast_to(self, tensor: Any, devices: Sequence[int]) -> list[Any]:
        """Copies of a tensor, one a device; the tensor itself on its own device."""
        if not devices:
            raise RuntimeError("Expected at least one device to broadcast to")
        if tensor.is_cuda and tensor.get_device() != devices[0]:
            raise RuntimeError(
                f"Expected the tensor on device {devices[0]}, the first to broadcast to, but found "
                f"it on device {tensor.get_device()}"
            )
        copies = []
        for place, device in enumerate(devices):
            own = tensor.is_cuda and place == 0
            copies.append(
                tensor
                if own
                else tensor.detach().to(f"cuda:{device}", non_blocking=True, copy=True)
            )
        return copies

    def broadcast_out(self, tensor: Any, outputs: Sequence[Any]) -> Sequence[Any]:
        """Copy a tensor into others."""
        for index, output in enumerate(outputs):
            if not output.is_cuda:
                raise RuntimeError(
                    f"Expected all output tensors to be CUDA tensors, but output tensor at index "
                    f"{index} has device {output.device}"
                )
            if output.shape != tensor.shape:
                raise RuntimeError(
                    f"Expected all output tensors to have the shape {tuple(tensor.shape)} of the "
                    f"source, but output tensor at index {index} has shape {tuple(output.shape)}"
                )
        for output in outputs:
            output.copy_(tensor, non_blocking=True)
        return outputs

    def broadcast_coalesced(
        self, tensors: Sequence[Any], devices: Sequence[int], buffer_size: int
    ) -> list[list[Any]]:
        """Copies of tensors, a list a device."""
        if any(tensor.get_device() != devices[0] for tensor in tensors):
            raise RuntimeError("All tensors must be on devices[0]: " + str(devices[0]))
        copies = [self.broadcast_to(tensor, devices) for tensor in tensors]
        return [[copy[place] for copy in copies] for place in range(len(devices))]

    def broadcast(self, tensors: Sequence[Any], root: int, streams: Any, comms: Any) -> None:
        self._check(tensors)
        with self._on(tensors, streams):
            for place, tensor in enumerate(tensors):
                if place != root:
                    tensor.copy_(tensors[root], non_blocking=True)

    def reduce(
        self, inputs: Sequence[Any], output: Any, root: int, op: int, streams: Any, comms: Any
    ) -> None:
        self._check(inputs)
        with self._on(inputs, streams):
            output.copy_(self._reduced(inputs, output, op))

    def all_reduce(
        self, inputs: Sequence[Any], outputs: Sequence[Any], op: int, streams: Any, comms: Any
    ) -> None:
        self._check(inputs, outputs)
        with self._on(inputs, streams):
            total = self._reduced(inputs, outputs[0], op)
            for output in outputs:
                output.copy_(total, non_blocking=True)

    def all_gather(
        self, inputs: Sequence[Any], outputs: Sequence[Any], streams: Any, comms: Any
    ) -> None:
        self._check(inputs, outputs, output_parts=len(inputs))
        with self._on(inputs, streams):
            for output in outputs:
                for part, tensor in zip(output.view(len(inputs), -1), inputs, strict=True):
                    part.copy_(tensor.view(-1), non_blocking=True)

    def reduce_scatter(
        self, inputs: Sequence[Any], outputs: Sequence[Any], op: int, streams: Any, comms: Any
    ) -> None:
        self._check(inputs, outputs, input_parts=len(inputs))
        with self._on(inputs, streams):
            total = self._reduced(inputs, inputs[0], op).view(len(inputs), -1)
            for part, output in zip(total, outputs, strict=True):
                output.view(-1).copy_(part, non_blocking=True)

    def _reduced(self, inputs: Sequence[Any], where: Any, op: int) -> Any:
        """The reduction of all inputs, on the device of ``where``."""
        if not 0 <= op < len(self._reductions):
            raise RuntimeError(
                f"reduction {op} is not emulated: use a sum, product, min, max or avg"
            )
        with self._torch.no_grad():
            total = inputs[0].to(where.device, non_blocking=True)
            for tensor in inputs[1:]:
                total = self._reductions[op](total, tensor.to(where.device, non_blocking=True))
            return total / len(inputs) if op == _AVERAGE else total

    def _on(self, tensors: Sequence[Any], streams: Any) -> ExitStack:
        """Makes the given streams current on their devices."""
        stack = ExitStack()
        stack.enter_context(self._torch.no_grad())
        for stream in streams or ():
            if stream is not None:
                stack.enter_context(self._torch.cuda.stream(stream))
        return stack

    def _check(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Any] | None = None,
        *,
        input_parts: int = 1,
        output_parts: int = 1,
    ) -> None:
        if not inputs:
            raise RuntimeError("input sequence can't be empty")
        if len({tensor.device for tensor in inputs}) != len(inputs):
            raise RuntimeError("inputs must be on unique devices")
        for tensor in [*inputs, *(outputs or ())]:
            if not tensor.is_cuda or tensor.is_sparse or not tensor.is_contiguous():
                raise RuntimeError(
                    "input and output elements must be dense contiguous CUDA tensors"
                )
            if tensor.dtype != inputs[0].dtype:
                raise RuntimeError("all inputs and outputs must be of the same Tensor dtype")
        if any(tensor.numel() != inputs[0].numel() for tensor in inputs):
            raise RuntimeError("all inputs must have the same number of elements")
        if outputs is None:
            return
        if len(outputs) != len(inputs):
            raise RuntimeError("inputs and outputs sequences have to be of the same length")
        for tensor in outputs:
            if tensor.numel() * input_parts != inputs[0].numel() * output_parts:
                raise RuntimeError(
                    "incompatible number of elements in inputs and outputs: each output must have "
                    f"{inputs[0].numel() * output_parts // input_parts}"
                )
