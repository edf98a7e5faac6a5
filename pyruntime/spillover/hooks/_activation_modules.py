"""``offload_activations_of``: what chosen modules save for backward leaves the device.

Note [Hooks by module]
----------------------
Each forward of a wrapped module runs inside of the saved-tensor hooks of one engine, which a hook
before forward enters and a hook after it leaves. Torch keeps saved-tensor hooks in a stack for each
thread, and so are the forwards that are under way. Torch calls the hook after forward for an
``Exception`` but not for an interrupt, nor where a compiler runs the call: each entry has the frame
that made it, and an entry whose frame does not run any more is left by the next one that comes.

Nothing says where a step begins. A module that is called again, after backward asked for something
or half of what was saved has died, begins the next round: several forwards before a backward are
one round, and so is a forward with a gradient in its midst, while parts of an old graph that
somebody still holds do not prolong the round for ever.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from spillover._errors import ConfigError, StateError
from spillover.hooks._activation_account import lock
from spillover.hooks._activation_engine import ActivationEngine
from spillover.hooks._activations import ActivationStats, OffloadedActivations, offload_activations

_NO_GRAPH_TASK = -1
_CHECKPOINT = "torch.utils.checkpoint"

#: Forwards under way on this thread that are inside of our hooks, the outermost first.
_thread = threading.local()
_tokens = itertools.count()


class OffloadedModules:
    """Handle of modules whose activations are offloaded; made by :func:`offload_activations_of`.

    Without it the modules stay as they are. As a context manager it calls :meth:`remove` when the
    block is left.
    """

    def __init__(self, context: OffloadedActivations, wrapping: _Wrapping | None) -> None:
        self._context = context
        self._wrapping = wrapping

    def stats(self) -> ActivationStats:
        """Figures of all the modules; cheap, and does not wait for the device."""
        return self._context.stats()

    def remove(self) -> None:
        """Make the modules ordinary again; does not block. A second call does nothing.

        What was saved already comes back in its backward. A forward that runs meanwhile, on another
        thread, ends as it began.
        """
        if self._wrapping is not None:
            self._wrapping.remove()

    def __enter__(self) -> OffloadedModules:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class _Entry:
    """One forward that is inside of our hooks."""

    __slots__ = ("_hooks", "_wrapping", "frame", "token")

    def __init__(self, wrapping: _Wrapping, token: int, frame: FrameType) -> None:
        self._wrapping = wrapping
        self.token = token
        self.frame = frame
        self._hooks = torch.autograd.graph.saved_tensors_hooks(wrapping.pack, wrapping.unpack)
        self._hooks.__enter__()
        wrapping.count_running(1)

    def is_dead(self, running: set[int]) -> bool:
        """Whether the forward was interrupted, and the hooks are those to leave next."""
        if id(self.frame) in running:
            return False
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self._wrapping.pack

    def leave(self) -> None:
        self._hooks.__exit__()
        self._wrapping.count_running(-1)


class _Wrapping:
    """What the hooks of one handle's modules share; they keep it alive."""

    def __init__(
        self, context: OffloadedActivations, engine: ActivationEngine, model: nn.Module | None
    ) -> None:
        self._context = context  # For spillover.stats(), as long as modules are wrapped.
        self._engine = engine
        self._staying = [weakref.ref(model)] if model is not None else []
        self.pack = functools.partial(engine.pack, context._counters)
        self.unpack = engine.unpack_after_flush
        # Guarded by the lock.
        self._running = 0
        self._is_removed = False
        self._before: list[Callable[[], None]] = []
        self._after: list[Callable[[], None]] = []

    def wrap(self, module: nn.Module) -> None:
        """Have the module's forwards enter and leave the hooks."""
        token = next(_tokens)
        starts, ends = _Starts(module, self, token), _Ends(module, self, token)
        self._before.append(module.register_forward_pre_hook(starts, prepend=True).remove)
        self._after.append(module.register_forward_hook(ends, always_call=True).remove)
        self._staying.append(weakref.ref(module))
        self._engine.keep_on_device(module)

    def remove(self) -> None:
        with lock:
            self._is_removed = True
            while self._before:
                self._before.pop()()
        _leave_dead(_entries(), sys._getframe(1))
        self.count_running(0)

    def count_running(self, change: int) -> None:
        """The hooks after forward stay for as long as forwards are to leave by them."""
        with lock:
            self._running += change
            if self._is_removed and self._running == 0:
                while self._after:
                    self._after.pop()()

    def start(self, token: int, frame: FrameType) -> None:
        """A module's forward begins, called from ``frame``."""
        entries = _entries()
        if entries:
            _leave_dead(entries, frame)
        if not _may_enter():
            return
        if self._engine.begin_round_at(token):
            for reference in self._staying:
                module = reference()
                if module is not None:
                    self._engine.keep_on_device(module)
        entries.append(_Entry(self, token, frame))

    @staticmethod
    def end(token: int) -> None:
        """The latest forward of a module is over, if it entered."""
        entries = _entries()
        for index in range(len(entries) - 1, -1, -1):
            if entries[index].token == token:
                while len(entries) > index:
                    entries.pop().leave()
                return


def _entries() -> list[_Entry]:
    entries: list[_Entry]
    entries = _thread.__dict__.setdefault("entries", [])
    return entries


def _leave_dead(entries: list[_Entry], frame: FrameType | None) -> None:
    """Leave the hooks of forwards that were interrupted: ``frame`` was not called by them."""
    running: set[int] = set()
    while frame is not None:
        running.add(id(frame))
        frame = frame.f_back
    while entries and entries[-1].is_dead(running):
        entries.pop().leave()


def _may_enter() -> bool:
    """Whether what is saved now may leave, and whether nobody else is to have it.

    Within a checkpointed region nothing is saved: its hooks are on top, and ours would replace
    them. What backward computes again it uses at once.
    """
    if torch._C._current_graph_task_id() != _NO_GRAPH_TASK:
        return False
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return False  # As by torch.func's transforms, where to enter is an error.
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return top is None or getattr(top[0], "__module__", None) != _CHECKPOINT


class _ModuleHook:
    """A hook that belongs to one module; for copies of that, and once unpickled, it does nothing.

    It must not hold the module, which holds it.
    """

    def __init__(self, module: nn.Module, wrapping: _Wrapping, token: int) -> None:
        self._module = weakref.ref(module)
        self._wrapping = wrapping
        self._token = token

    def belongs_to(self, module: nn.Module) -> bool:
        return self._module() is module

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModuleHook:
        return self

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Starts(_ModuleHook):
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.belongs_to(module):
            self._wrapping.start(self._token, _caller())


class _Ends(_ModuleHook):
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.belongs_to(module):
            self._wrapping.end(self._token)


class _Inert:
    """What is left of a hook in a module that was pickled."""

    def __call__(self, *args: Any) -> None:
        pass


def _caller() -> FrameType:
    """The frame of torch that called a hook: the nearest that runs no hook, and no wrapper of it.

    The compiler's wrappers of what it does not trace lie in between.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename != _MODULE_FILE:
        frame = frame.f_back
    return frame


_MODULE_FILE = nn.Module.__call__.__code__.co_filename


def offload_activations_of(
    modules: nn.Module | Iterable[nn.Module], **options: Any
) -> OffloadedModules:
    """Keep what chosen modules save for backward in pinned host memory or on disk.

    As if each forward of one of them ran inside of :func:`offload_activations`, for models whose
    training loop is somebody else's: ``spillover.offload_activations_of(model.layers)``. Gradients
    are equal to those without it, bit for bit.

    Parameters
    ----------
    modules
        One module, or several: an iterable of modules, an ``nn.ModuleList`` or ``nn.ModuleDict``.
        What else the model saves, as for its loss, stays. A module that comes twice counts once.
    **options
        Those of :func:`offload_activations`, as ``tier``, ``directory`` and ``host_budget``. The
        modules' own parameters and buffers stay in any case; give ``model`` where they are handed
        buffers of the rest of it.

    Returns
    -------
    OffloadedModules
        ``stats()`` has the figures, ``remove()`` ends it. The modules stay wrapped if the handle is
        dropped. With ``SPILLOVER=0`` it does nothing.

    Raises
    ------
    ConfigError
        An option is wrong, or ``modules`` is not made of modules.
    StateError
        A module is wrapped already.
    StorageError
        A folder cannot be used.
    Exception
        Later, from forward or backward: see :func:`offload_activations`.

    Notes
    -----
    Any number of forwards may come before a backward, on any threads. Modules may call one another
    and themselves. Copies of a module, by deepcopy or pickle, are not wrapped.

    Nothing leaves from a forward inside of a ``torch.utils.checkpoint`` region, where nothing is
    saved, nor from one that backward makes, as to compute a region again. The input of a region
    inside of a wrapped module's forward is offloaded. That of a region around the module, as
    Transformers makes it, is saved outside of the module and stays; wrap the module that holds the
    layers, or use :func:`offload_activations` around the whole forward, to have it offloaded. Under
    ``torch.compile`` each wrapped module begins and ends a graph, so that ``fullgraph=True`` is an
    error; wrap before the first compiled call.

    An in-place change of what a module saved is found by backward as ever; it is not ordered after
    the copy out until a backward has ended.
    """
    chosen = _chosen(modules)
    for module in chosen:
        if any(
            isinstance(hook, _Starts) and hook.belongs_to(module)
            for hook in module._forward_pre_hooks.values()
        ):
            raise StateError(
                f"activations of this {type(module).__name__} are offloaded already; call remove() "
                "on the handle that offload_activations_of gave for it first"
            )
    context = offload_activations(**options)
    engine = context._engine
    if engine is None:
        return OffloadedModules(context, None)
    wrapping = _Wrapping(context, engine, context._model)
    for module in chosen:
        wrapping.wrap(module)
    return OffloadedModules(context, wrapping)


def _chosen(modules: object) -> list[nn.Module]:
    found = {id(module): module for module in _each(modules)}
    if not found:
        raise ConfigError("modules has none in it; give a module, or several such as model.layers")
    return list(found.values())


def _each(modules: object) -> Iterator[nn.Module]:
    if isinstance(modules, nn.ModuleDict) and _is_never_called(modules):
        modules = modules.values()
    if isinstance(modules, nn.Module) and not _is_never_called(modules):
        yield modules
        return
    if isinstance(modules, str) or not isinstance(modules, Iterable):
        raise ConfigError(
            "modules must be a torch.nn.Module or an iterable of modules such as model.layers, "
            f"not {modules!r}"
        )
    for each in modules:
        if not isinstance(each, nn.Module):
            raise ConfigError(
                f"modules must consist of torch.nn.Module objects such as those of model.layers; "
                f"one is {each!r}"
            )
        yield from _each(each)


def _is_never_called(module: nn.Module) -> bool:
    """A list or dict of modules, which has no forward of its own."""
    kinds = (nn.ModuleList, nn.ModuleDict)
    return isinstance(module, kinds) and type(module).forward is nn.Module.forward
