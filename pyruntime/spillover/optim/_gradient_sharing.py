"""Whether somebody besides autograd has a gradient, and may write to it when backward is over.

Note [Shared gradients]
-----------------------
A copy out runs beside what comes after backward. That is right for memory that autograd alone has:
nobody can write to it, and the engine holds it. What a program holds (a tensor that it assigned to
``.grad``, kept in a hook or passed to ``backward()``; a buffer of which gradients are views) it may
write to as soon as backward is over, and its stream has to wait for the copy first, which costs the
overlap of that gradient. So references are counted: to the Python object, to the tensor behind it,
and to its storage. What they are when autograd alone has a gradient is measured once, by a backward
of a single number, as it differs between versions of Python and torch.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch

_Counts = tuple[int, int, int]


class _Probe(torch.Tensor):
    """Stands for a placeholder in the measurement."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls) -> _Probe:
        made: _Probe = torch.Tensor._make_wrapper_subclass(cls, (), device=torch.device("cpu"))
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        global _added_alone
        _added_alone = _counts(args, 1)
        return args[0]


_added_alone: _Counts | None = None
_assigned_alone: _Counts | None = None
_base_uses_alone = 0


def measure() -> None:
    """Measure, in a thread that runs no backward; at the second call nothing is done."""
    global _assigned_alone, _base_uses_alone
    if _assigned_alone is not None:
        return
    _base_uses_alone = _base_uses(torch.zeros(1, device="cpu").view(1))
    with torch.enable_grad(), torch.inference_mode(False):
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        leaf.grad = _Probe()
        (leaf * 2).backward()  # type: ignore[no-untyped-call]
        leaf.grad = torch.zeros((), device="cpu")
    _assigned_alone = _counts([leaf.grad], 0)


def is_shared_addend(arguments: Sequence[Any]) -> bool:
    """Of what autograd adds to a placeholder: the arguments of that operator."""
    alone = _added_alone
    return alone is None or any(map(operator.gt, _counts(arguments, 1), alone))


def is_shared_gradient(only: Sequence[torch.Tensor]) -> bool:
    """Of a parameter's ``.grad``, which the list alone has."""
    alone = _assigned_alone
    return alone is None or any(map(operator.gt, _counts(only, 0), alone))


def _counts(holder: Sequence[Any], index: int) -> _Counts:
    storage = torch._C._storage_Use_Count(holder[index].untyped_storage()._cdata)
    if holder[index]._is_view():
        # The view has the base, and the base the storage. Who has the base besides, has that, too.
        storage += _base_uses(holder[index]) - _base_uses_alone - 1
    return sys.getrefcount(holder[index]), holder[index]._use_count(), storage


def _base_uses(view: torch.Tensor) -> int:
    """References to the base of a view, and to its Python object."""
    base = view._base
    assert base is not None
    return base._use_count() + sys.getrefcount(base)  # type: ignore[attr-defined,no-any-return]
