"""Activations on the host as torchtune's ``OffloadActivations`` does it, by its behaviour.

A second stream copies out, and the last five saved tensors stay alive while it does; the compute
stream waits for the copy of the sixth before that tensor is freed. In backward each tensor is
copied back on the second stream when it is asked for, compute waits for it, and it is kept until
the node after its own has been launched. Neither views of one storage nor views of weights are told
apart from other tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_MIN_BYTES = 1024
_STASHED_MAX = 5


@dataclass(eq=False)
class _Saved:
    """A tensor's copy on the host, or the tensor where that stays on the device."""

    tensor: torch.Tensor
    is_copy: bool


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """Entered once a step, around forward; backward follows before the next."""

    def __init__(self) -> None:
        self._compute = torch.cuda.current_stream()
        self._copies = torch.cuda.Stream()
        # Tensors whose copies out may be under way, oldest first.
        self._leaving: dict[_Saved, tuple[torch.Tensor, torch.cuda.Event]] = {}
        # What came back for the present node, and for the one before it.
        self._arrived: list[torch.Tensor] = []
        self._node: Any = None
        super().__init__(self._pack, self._unpack)

    def _let_go(self, count_max: int) -> None:
        while len(self._leaving) > count_max:
            saved = next(iter(self._leaving))
            _, copied = self._leaving.pop(saved)
            self._compute.wait_event(copied)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        if tensor.nbytes < _MIN_BYTES or isinstance(tensor, torch.nn.Parameter):
            return _Saved(tensor, is_copy=False)
        self._let_go(_STASHED_MAX - 1)
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            saved = _Saved(torch.empty_like(tensor, device="cpu", pin_memory=True), is_copy=True)
            saved.tensor.copy_(tensor, non_blocking=True)
        self._leaving[saved] = (tensor, self._copies.record_event())
        return saved

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if not saved.is_copy:
            return saved.tensor
        if saved in self._leaving:
            return self._leaving[saved][0]
        node = torch._C._current_autograd_node()
        if node is not self._node:
            if self._node is None:
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(self._end_backward)
            self._node = node
            finished, self._arrived = self._arrived, []
            node.register_hook(lambda inputs, outputs: self._after_node(finished))
        with torch.cuda.stream(self._copies):
            tensor = saved.tensor.to("cuda", non_blocking=True)
        self._compute.wait_stream(self._copies)
        self._arrived.append(tensor)
        return tensor

    def _after_node(self, finished: list[torch.Tensor]) -> None:
        """A node is launched: what the one before it used is reused after it on the copy stream."""
        self._let_go(0)
        if finished:
            self._copies.wait_stream(self._compute)
            finished.clear()

    def _end_backward(self) -> None:
        self._let_go(0)
        self._copies.wait_stream(self._compute)
        self._arrived.clear()
        self._node = None
