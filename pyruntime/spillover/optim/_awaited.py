"""Tensors whose bytes are still to come: whatever uses one in Python waits for them first.

Note [Awaited tensors]
----------------------
While a weight is still to be written, its object has the class :class:`AwaitedParameter`, which
derives from its own and differs in ``__torch_function__`` alone. So torch calls us for every
function, method and attribute that gets the weight: ``F.linear(x, weight)``, ``weight.data``,
``weight.detach()``, ``weight.data_ptr()``, ``torch._foreach_mul_([weight], 2)``, ``weight.data =
other``. We wait, give the object its own class back, and call again. Gradients that are still to be
read have :class:`AwaitedTensor` in the same way.

Considered instead: a TorchFunctionMode, as the design had it. A mode costs every operator of the
thread, is one of a stack that others push to and pop from in between (``with torch.device(...):
optimizer.step()`` would pop ours), belongs to one thread, and is a guard of every function that
torch.compile compiled. A class costs the tensor alone, and all threads see it.

What torch does not tell us is how C++ code uses a tensor that it was given without a function of
torch: extensions that take tensors from pybind11, TorchScript, replays of CUDA graphs. Those have
to come after a wait that somebody else makes; Note [Overlap] has who does.

Objects keep the class until somebody has waited, also where the bytes are there by then: only a
thread that has waited knows that they are. They are not kept for that when the bytes are on their
way: whoever frees one waits.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

#: Blocks until the bytes are there; told whether a module's forward asks.
Wait = Callable[[bool], None]

_lock = threading.RLock()  # Freeing a tensor may call anything.
# By identity. Guarded by the lock.
_entries: dict[int, Awaiting] = {}


class Awaiting:
    """One tensor that is awaited, until somebody has waited. Any thread may call its methods.

    They do nothing where somebody has waited, also if the tensor is awaited anew by then.
    """

    __slots__ = ("__weakref__", "_kept", "_key", "_tensor", "wait")

    def __init__(self, tensor: torch.Tensor, wait: Wait) -> None:
        self.wait = wait
        self._key = id(tensor)
        self._kept: torch.Tensor | None = tensor
        self._tensor: weakref.ref[torch.Tensor] | None = None

    @property
    def tensor(self) -> torch.Tensor | None:
        """None where it was freed, which it may be after :meth:`let_go`."""
        if self._tensor is not None:
            return self._tensor()
        return self._kept

    def end(self) -> None:
        """Have uses be ordinary again, when the caller has waited."""
        tensor = self.tensor
        with _lock:
            if _entries.get(self._key) is self:
                del _entries[self._key]
                if tensor is not None:
                    _restore(tensor)

    def forget(self) -> None:
        """Have the next use not call ``wait`` any more; the class stays until then."""
        with _lock:
            if _entries.get(self._key) is self:
                del _entries[self._key]

    def let_go(self) -> None:
        """Have the tensor be freed when nobody else has it, which then waits."""
        with _lock:
            if self._kept is not None and _entries.get(self._key) is self:
                self._tensor = weakref.ref(
                    self._kept, functools.partial(_forget, weakref.ref(self))
                )
                self._kept = None


def _forget(awaiting: weakref.ref[Awaiting], _: object) -> None:
    """Before the memory of a tensor is freed."""
    found = awaiting()
    if found is not None:
        found.wait(False)
        found.forget()


def begin(tensor: torch.Tensor, wait: Wait) -> Awaiting:
    """Have every use of ``tensor`` call ``wait`` first, which blocks and may raise.

    ``tensor`` must be one that :func:`can_await` accepts. When ``wait`` raises, the use of the
    tensor does, and the next use calls ``wait`` again.
    """
    # Making it may collect garbage, whose end may be to wait, which nobody may with the lock.
    awaiting = Awaiting(tensor, wait)
    with _lock:
        _entries[id(tensor)] = awaiting
        tensor.__class__ = _AWAITED.get(type(tensor), type(tensor))
    return awaiting


def has_lock() -> bool:
    """Whether this thread has what those need that end waits, so that it must not wait."""
    return _lock._is_owned()  # type: ignore[attr-defined, no-any-return]


def can_await(tensor: torch.Tensor) -> bool:
    """Whether it is of a class that we can put ours in place of."""
    return type(tensor) in _AWAITED


def is_awaited(tensor: object) -> bool:
    """Whether uses of it wait."""
    return type(tensor) in _OWN


def is_any_awaited() -> bool:
    """Whether any tensor is. Those that nobody has to wait for any more may be left out."""
    return bool(_entries)


def wait_for(tensors: Iterable[torch.Tensor | None], *, in_forward: bool = False) -> None:
    """Block until the bytes of those that are awaited are there. Raises what ``wait`` does."""
    for tensor in tensors:
        if tensor is None or type(tensor) not in _OWN:
            continue
        with _lock:
            entry = _entries.get(id(tensor))
        if entry is not None:
            entry.wait(in_forward)
        with _lock:
            # Unless it is awaited anew by now.
            if _entries.get(id(tensor)) is entry:
                _entries.pop(id(tensor), None)
                _restore(tensor)


def wait_for_all(*, in_forward: bool = False) -> None:
    """Block until no tensor of the process is awaited. Raises what ``wait`` does."""
    while True:
        with _lock:
            found = list(_entries.values())
        if not found:
            return
        for each in found:
            each.wait(in_forward)
            each.end()


def _restore(tensor: torch.Tensor) -> None:
    own = _OWN.get(type(tensor))
    if own is not None:
        tensor.__class__ = own


def _awaited_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if type(value) in _OWN:
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _awaited_in(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _awaited_in(each)


# What reads and writes no bytes, and leads nobody to them. ``device`` is none of it: code that is
# about to hand a tensor to C++ asks for its device first.
_TENSOR: Any = torch.Tensor
_HARMLESS = frozenset(
    {
        _TENSOR.grad.__get__,
        _TENSOR.grad.__set__,
        _TENSOR.grad.__delete__,
        _TENSOR.requires_grad.__get__,
        _TENSOR.shape.__get__,
        _TENSOR.dtype.__get__,
        _TENSOR.ndim.__get__,
        _TENSOR.is_leaf.__get__,
        _TENSOR.grad_fn.__get__,
        _TENSOR.size,
        _TENSOR.numel,
        _TENSOR.dim,
        _TENSOR.register_hook,
        _TENSOR.register_post_accumulate_grad_hook,
    }
)


_MAKE_PARAMETER = nn.Parameter.__new__.__code__


class _Awaited:
    """What both classes have before torch's methods."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # A compiled function must not contain the use: it runs when nobody waits.
            torch._dynamo.graph_break()
        is_parameter = bool(args) and type(args[0]) is AwaitedParameter
        if is_parameter and func in _HARMLESS:
            # The lock is for who frees a gradient: he comes after its reader has let go of it.
            with _lock, torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = list(_awaited_in((args, kwargs)))
        if not found:
            wait_for_all()  # It is within something that we do not look into.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        wait_for(found)
        if func is torch.Tensor.detach and sys._getframe(1).f_code is _MAKE_PARAMETER:
            # Of ``nn.Parameter(weight)``, which took the weight for something custom.
            return nn.Parameter(args[0])
        return func(*args, **kwargs)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Of torch's methods that lead to bytes the one that it calls no class for."""
        wait_for([self])  # type: ignore[list-item]
        return self.set_(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        wait_for([self])  # type: ignore[list-item]
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait_for([self])  # type: ignore[list-item]
        return self.__reduce_ex__(protocol)


class AwaitedParameter(_Awaited, nn.Parameter):
    """A parameter while it is awaited; Note [Awaited tensors]."""


class AwaitedTensor(_Awaited, torch.Tensor):
    """Any other tensor while it is awaited."""


_AWAITED: dict[type, Any] = {nn.Parameter: AwaitedParameter, torch.Tensor: AwaitedTensor}
_OWN: dict[type, Any] = {awaited: own for own, awaited in _AWAITED.items()}
