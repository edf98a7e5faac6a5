"""``torch.cuda.MemPool`` and CUDA graphs' hold on one, for the plain adapter.

torch's class of pluggable allocators can be told to take memory from a private pool, but not that
there is one: torch's own ``MemPool`` raises. The class here has the same functions and takes its
place; ``torch.cuda.use_mem_pool`` works on it as it is.
"""

from __future__ import annotations

import weakref
from typing import Any

from spillover import _core
from spillover._errors import StateError
from spillover.allocator._plain_figures import live_blocks


class MemPool:
    """A private pool of memory on the device that is current.

    Parameters
    ----------
    allocator
        Must be None: memory comes from Spillover's pool.
    use_on_oom
        Whether the pool's free memory serves ordinary requests that would fail otherwise.
    no_split
        Whether every tensor has a segment of its own.

    Raises
    ------
    NotImplementedError
        An allocator was given.
    """

    def __init__(
        self, allocator: Any = None, use_on_oom: bool = False, no_split: bool = False
    ) -> None:
        import torch

        if allocator is not None:
            raise NotImplementedError(
                "spillover's plain adapter does not support torch.cuda.MemPool with an allocator "
                "of its own; make the pool without one, or have a C++ compiler on the machine, "
                "with which spillover.allocator.install() uses the full adapter"
            )
        device = torch.cuda.current_device()
        first, second = torch.cuda.graph_pool_handle()
        number = (first, second)
        _core.plain_add_pool_use(device, number)
        # Not at the end of the program: memory goes with the process.
        weakref.finalize(self, _release, device, number, use_on_oom, no_split).atexit = False
        self._device = device
        self._id = number
        if use_on_oom or no_split:
            _core.plain_set_pool_options(device, number, use_on_oom, no_split)

    @property
    def id(self) -> tuple[int, int]:
        """The pool's number in torch."""
        return self._id

    @property
    def device(self) -> int:
        """The device whose memory it has."""
        return self._device

    @property
    def allocator(self) -> None:
        """None: memory comes from Spillover's pool."""
        return None

    def use_count(self) -> int:
        """How many hold the pool: this object, ``use_mem_pool`` and CUDA graphs."""
        return _core.plain_pool_use_count(self._device, self._id)

    def snapshot(self, include_traces: bool = True) -> list[dict[str, Any]]:
        """The pool's segments, as ``torch.cuda.memory_snapshot`` gives them."""
        import torch

        segments: list[dict[str, Any]] = torch._C._cuda_memorySnapshot((*self._id, include_traces))[
            "segments"
        ]
        return segments


def _release(device: int, number: tuple[int, int], use_on_oom: bool, no_split: bool) -> None:
    if use_on_oom:
        _core.plain_set_pool_options(device, number, False, no_split)
    _core.plain_remove_pool_use(device, number)
    _core.plain_trim_pool(device, number)


def replace() -> None:
    """Put the class in torch's place, and have graphs hold pools and tell what lives in them."""
    import torch

    cuda: Any = torch.cuda
    native: Any = torch._C
    cuda.memory.MemPool.__init__ = _refuse_torchs_own
    cuda.MemPool = cuda.memory.MemPool = MemPool
    native._cuda_checkPoolLiveAllocations = _holds_exactly
    if hasattr(cuda.CUDAGraph, "_retain_pool"):
        _have_graphs_hold_pools(cuda.CUDAGraph)


def _refuse_torchs_own(self: Any, *arguments: Any, **keywords: Any) -> None:
    """In place of the constructor of torch's class, which some module may hold by name."""
    raise StateError(
        "this MemPool is torch's own class, which was imported by name before "
        "spillover.allocator.install() and does not work with its plain adapter; write "
        "torch.cuda.MemPool, import the class after install(), or start the script with "
        "'spillover run'"
    )


def _holds_exactly(device: int, pool: tuple[int, int], expected: set[int]) -> bool:
    """Whether a private pool's live blocks are those at the expected addresses."""
    arena = _core.plain_arena_of(device, pool)
    if arena is None:
        raise RuntimeError(f"Could not find pool of id {tuple(pool)}")
    return live_blocks(device, arena) == set(expected)


class _Use:
    """Holds a pool for a graph until it is let go of."""

    def __init__(self, device: int, number: tuple[int, int]) -> None:
        _core.plain_add_pool_use(device, number)
        weakref.finalize(self, _core.plain_remove_pool_use, device, number).atexit = False


def _have_graphs_hold_pools(graph_class: Any) -> None:
    """A graph keeps the pools that were used in its capture, until it is reset or gone."""
    import torch

    reset = graph_class.reset

    def retain_pool(graph: Any, pool: Any) -> None:
        number = tuple(getattr(pool, "id", pool))
        graph.__dict__.setdefault("_spillover_uses", []).append(
            _Use(torch.cuda.current_device(), number)
        )

    def reset_graph(graph: Any) -> None:
        reset(graph)
        graph.__dict__.pop("_spillover_uses", None)

    graph_class._retain_pool = retain_pool
    graph_class.reset = reset_graph
