"""Keeps autograd from holding device copies of streamed weights between forward and backward.

An operator such as ``linear`` saves its weight for backward. While a block runs, a pair of
saved-tensor hooks replaces each saved view of the block's device copy by a description of the view;
when backward asks for it, the block's copy is fetched (usually it is there already) and the view is
made again. Tensors that are not such views go to the hooks that were active outside of the block,
so that checkpointing and activation offloading around a block keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spillover.hooks._parameters_block import StreamedBlock

if TYPE_CHECKING:
    from spillover.hooks._parameters_engine import WeightStreamer


@dataclass(frozen=True, eq=False)
class SavedWeight:
    """A view of a block's device copy, without the copy."""

    block: StreamedBlock
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    weight_index: int
    version: int


class SavedWeightHooks:
    """The pair of hooks for one call of one block; entered before forward and left after it."""

    def __init__(self, streamer: WeightStreamer) -> None:
        self._streamer = streamer
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        # Bound once: leaving by force compares identities.
        self.pack: Callable[[torch.Tensor], Any] = self._pack
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self._unpack)

    def enter(self) -> None:
        """Start to catch saved tensors."""
        self._hooks.__enter__()

    def leave(self) -> None:
        """Stop to catch saved tensors."""
        self._hooks.__exit__()

    def is_innermost(self) -> bool:
        """Whether autograd calls this pair now."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self.pack

    def _pack(self, tensor: torch.Tensor) -> Any:
        block = self._streamer.copies.over(tensor)
        if block is not None:
            offset = int(tensor.storage_offset())
            index = block.weight_at(offset * tensor.element_size())
            return SavedWeight(
                block=block,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                stride=tuple(tensor.stride()),
                storage_offset=offset,
                weight_index=index,
                version=block.versions[index],
            )
        return self._outer[0](tensor) if self._outer is not None else tensor

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, SavedWeight):
            return self._streamer.reload(packed)
        unpacked: torch.Tensor = self._outer[1](packed) if self._outer is not None else packed
        return unpacked
