"""Updates of a step that run under the next forward.

Note [Overlap]
--------------
``step()`` checks everything, has all memory, reads options, takes hold of gradients, tells autograd
that the weights have changed, and gives the rest to one thread of the process. The thread updates
parameters in the order in which the last forward used them. A weight that is still to come is
awaited by whatever uses it:

- Forward pre-hooks of all modules wait for the module's own parameters, whoever reads them then:
  C++ extensions, too. Those that may read parameters of their children, or run without calling
  them, wait for all below them: ``nn.MultiheadAttention``, modules in evaluation, those that
  torch.compile or TorchScript run, and those with a ``forward`` of their own, as graphed callables.
  In a transform of torch.func, which wraps weights in C++, they wait for everything.
- Whatever else uses a weight in Python waits by Note [Awaited tensors]: an EMA, a weight that
  another module uses, DDP's broadcast, ``state_dict()``, ``deepcopy``.
- The optimizer's own methods wait for all, as do forks and the end of the process.

Not overlapped, so updated when ``step()`` returns, are weights whose memory somebody else holds at
that time (the storage has other users: an alias such as ``weight.data`` that was kept can be read
without the weight), weights that no hooked module has, weights on the host, weights that a CUDA
graph's capture has used, those below a module that was compiled in place, and tensor subclasses.
The same holds for a gradient on the device that somebody else has, or whose memory he has.

A wait ends when the new weight is in device memory, not when its copy is ordered before the current
stream: from then on the weight is good for every stream and thread. The host has time for that,
since it runs ahead of the device; where it does not, updates are what the step takes. Nobody waits
for more than his weight, and the copies before it.

Old weights are overwritten when the kernels that were launched before ``step()`` are over, since
copies out wait for them, and each copy in follows a copy out (Note [Optimizer pipeline]). Kernels
that are launched later read new weights only. Gradients are read from where they are: one on the
device is awaited as weights are, so that what writes to it comes later, by a backward that adds to
it, too, and setting ``.grad`` to None frees it when it was read. Offloaded ones are leased.

A failure is raised by whoever waits next, once. Nothing is lost: whoever waits then has the step
continue where it stopped (Note [Failed updates]), and a ``step()`` with gradients that a step which
failed had already taken applies none of them twice.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from spillover._errors import ConfigError, StateError
from spillover._stalls import Stall
from spillover.optim import _awaited
from spillover.optim._host_step import is_stepping, stepping
from spillover.optim._host_work import Work

_FORWARD = Stall("optimizer", "forward: a weight's update")
_READ = Stall("optimizer", "something else that uses a weight: its update")
_GRADIENT = Stall("optimizer", "something that uses a gradient: its update")
_ALL = Stall("optimizer", "all updates of the last step")
_OTHERS = Stall("optimizer", "updates that cannot overlap")

Modules = nn.Module | Sequence[nn.Module]

_steps: weakref.WeakSet[PendingStep] = weakref.WeakSet()


def _nothing(_: object) -> None:
    """What is left of a step that is over: it must not keep its optimizer."""


def _executor() -> ThreadPoolExecutor:
    """One thread, which the interpreter joins before it shuts down."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="spillover-optimizer")


_worker = _executor()


class PendingStep:
    """The updates of one step, on the worker. Any thread may wait.

    Parameters
    ----------
    works
        To be done, in this order.
    awaited
        Those of them whose weights and gradients are awaited by what uses them.
    run
        Does what is left of them; called again after a failure. It tells :meth:`sent` which weights
        are on their way, and :meth:`used` which gradients it does not need any more.
    note_sent
        Called on the worker for each weight that is on its way, before anybody hears of it.
    taken
        For the caller: the gradients of the step.
    """

    def __init__(
        self,
        works: Sequence[Work],
        awaited: Sequence[Work],
        *,
        run: Callable[[PendingStep], None],
        note_sent: Callable[[Work], None],
        taken: dict[int, Any],
    ) -> None:
        self.works = works
        chosen = set(awaited)
        self._others = [id(each.parameter) for each in works if each not in chosen]
        self.taken = taken
        self.has_failed = False
        #: Whether it will be done, whatever breaks into :meth:`start`.
        self.is_started = False
        self._awaited = awaited
        # Those that are over are gone, so that nothing keeps this.
        self._awaitings: list[weakref.ref[_awaited.Awaiting]] = []
        # By the identity of the parameter; a gradient is let go when it was read.
        self._gradients: dict[int, tuple[_awaited.Awaiting, Any]] = {}
        self._run_works = run
        self._note_sent = note_sent
        self._condition = threading.Condition()  # Its lock may be taken again.
        # Guarded by the condition's lock.
        self._unstarted = list(reversed(awaited))
        self._is_submitted = False
        self._sent: dict[int, torch.cuda.Event | None] = {}
        self._used: set[int] = set()
        self._error: BaseException | None = None
        self._is_reported = False
        self._is_over = False
        _steps.add(self)

    def start(self) -> None:
        """Have weights and gradients awaited, and hand it to the worker.

        Where something breaks into it (Ctrl-C, a signal's handler that reads weights), whoever
        waits goes on with it.
        """
        with self._condition:
            while self._unstarted:
                work = self._unstarted[-1]
                self._begin(work)
                if self._unstarted and self._unstarted[-1] is work:
                    self._unstarted.pop()
            if not self._is_submitted:
                self._submit()
                self._is_submitted = True

    def _begin(self, work: Work) -> None:
        parameter, gradient = work.parameter, work.gradient
        key = id(parameter)
        if work.pending is None and gradient is parameter.grad and key not in self._gradients:
            self._gradients[key] = (
                _awaited.begin(gradient, functools.partial(self._wait_for_gradient, key)),
                parameter.register_hook(  # type: ignore[no-untyped-call]
                    functools.partial(_before_it_is_added_to, parameter)
                ),
            )
        torch.autograd.graph.increment_version(parameter)
        awaiting = _awaited.begin(parameter, functools.partial(self._wait_for_weight, key))
        self._awaitings.append(weakref.ref(awaiting))

    def _submit(self) -> None:
        try:
            _worker.submit(self._run)
        except RuntimeError:
            self._run()  # The interpreter is shutting down, and has ended the worker.

    # ---- by the worker -------------------------------------------------------------------------

    def _run(self) -> None:
        with self._condition:
            if self._is_over or self._error is not None:
                return  # It was submitted twice, by what broke into :meth:`start`.
        try:
            # Our own uses of weights wait for nothing.
            with stepping(), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                self._run_works(self)
        except BaseException as error:
            with self._condition:
                self._error = error
                self.has_failed = True
                self._condition.notify_all()
        else:
            self._run_works = self._note_sent = _nothing
            # The program may free what it does not use any more, which waits for the last copies.
            # We must not: a stream may be recording a graph by now.
            self.works = self._awaited = ()
            for awaiting in self._weights_awaited():
                awaiting.let_go()
            with self._condition:
                self._is_over = True
                self._condition.notify_all()

    def _weights_awaited(self) -> Iterator[_awaited.Awaiting]:
        found = (each() for each in self._awaitings)
        return (each for each in found if each is not None)

    def sent(self, work: Work, event: torch.cuda.Event | None) -> None:
        """The new weight is there after ``event``; None: it is there."""
        self._note_sent(work)
        with self._condition:
            self._sent[id(work.parameter)] = event
            self._condition.notify_all()

    def used(self, work: Work) -> None:
        """The gradient is not needed any more, and is let go."""
        gradient = work.gradient
        work.gradient = gradient.new_empty(0, device="cpu")
        if work.pending is not None:
            work.pending.release()
        elif id(work.parameter) in self._gradients:
            awaiting, hook = self._gradients.pop(id(work.parameter))
            hook.remove()
            awaiting.forget()
        with self._condition:
            self._used.add(id(work.parameter))
            self._condition.notify_all()

    def is_sent(self, work: Work) -> bool:
        """Whether its new weight is on its way, or there."""
        with self._condition:
            return id(work.parameter) in self._sent

    # ---- by those who wait ---------------------------------------------------------------------

    def _wait_for_weight(self, key: int, in_forward: bool) -> None:
        self._wait_for(key, _FORWARD if in_forward else _READ)

    def _wait_for(self, key: int, stall: Stall) -> None:
        self._wait(lambda: key in self._sent, stall)
        event = self._sent[key]
        if event is not None:
            stall.wait(event.synchronize)

    def _wait_for_gradient(self, key: int, in_forward: bool) -> None:
        self._wait(lambda: key in self._used, _GRADIENT)

    def wait(self) -> None:
        """Block until all weights are there. Raises what went wrong, once."""
        self._wait(lambda: self._is_over, _ALL)
        for event in dict.fromkeys(self._sent.values()):
            if event is not None:
                _ALL.wait(event.synchronize)
        for awaiting in self._weights_awaited():
            awaiting.end()

    def settle(self) -> None:
        """Block until it is over or has failed, of which others will hear."""
        self._wait(lambda: self._is_over or self._error is not None, _ALL)
        if self._is_over:
            self.wait()

    def wait_for_others(self) -> None:
        """Block until those weights are there that are not awaited."""
        try:
            for key in self._others:
                self._wait_for(key, _OTHERS)
        except KeyboardInterrupt:
            # Nobody would wait for them.
            for key in self._others:
                self._wait_for(key, _OTHERS)
            raise

    def unheard_error(self) -> BaseException | None:
        """A failure that nobody has been told of."""
        return None if self._is_reported else self._error

    def _wait(self, is_so: Callable[[], bool], stall: Stall) -> None:
        with self._condition:
            if is_so():
                return
            if is_stepping() or _awaited.has_lock():
                raise StateError(
                    "an update cannot wait for updates: something did that while an optimizer's "
                    "step ran, such as a __del__ of garbage that was collected there"
                )
            if not self._is_submitted:
                self.start()
        stall.wait(functools.partial(self._wait_until, is_so))

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        with self._condition:
            while not is_so():
                error = self._error
                if error is not None and not self._is_reported:
                    self._is_reported = True
                    raise error
                if error is not None:
                    self._error, self._is_reported = None, False
                    self._submit()
                    continue  # It may be over already.
                self._condition.wait()


class Overlap:
    """The hooks of one optimizer, and the step that is under way.

    One thread at a time makes steps, as for all optimizers; hooks run on any.
    """

    def __init__(self, modules: Modules) -> None:
        roots: list[Any]
        roots = list(modules) if isinstance(modules, list | tuple | set) else [modules]
        for root in roots:
            if not isinstance(root, nn.Module):
                raise ConfigError(
                    f"overlap must be the module that uses the weights, or several, such as "
                    f"overlap=model; got a {type(root).__name__}"
                )
        self._roots = roots
        self.pending: PendingStep | None = None
        # By identity of parameters: their places in the last forward, and in this one.
        self._last_order: dict[int, int] = {}
        self._order: dict[int, int] = {}
        self._entered: set[int] = set()
        self._captured: set[int] = set()
        self._hooks: list[Any] = []
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hook_all()
        weakref.finalize(self, _remove, self._hooks)

    def _hook_all(self) -> list[nn.Module]:
        """Have hooks of all modules, those that were added meanwhile, too."""
        found = dict.fromkeys(each for root in self._roots for each in root.modules())
        modules = [each for each in found if not isinstance(each, torch.jit.ScriptModule)]
        for module in modules:
            if module not in self._hooked:
                self._hooked.add(module)
                self._hooks.append(module.register_forward_pre_hook(_Hook(self), prepend=True))
        return modules

    # ---- forward -------------------------------------------------------------------------------

    def enter(self, module: nn.Module) -> None:
        """Before ``module`` runs."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Its weights may be of a transform of torch.func, which wraps others: any.
            _awaited.wait_for_all(in_forward=True)
            return
        if id(module) not in self._entered:
            self._entered.add(id(module))
            self._note(module)
        if torch.cuda.is_current_stream_capturing():
            self._captured.update(map(id, module.parameters()))
        if _awaited.is_any_awaited():
            is_whole = not module.training or _runs_children(module)
            weights = module.parameters() if is_whole else module._parameters.values()
            _awaited.wait_for(weights, in_forward=True)

    def _note(self, module: nn.Module) -> None:
        whole = _runs_children(module)
        for parameter in module.parameters() if whole else module._parameters.values():
            if parameter is not None:
                self._order.setdefault(id(parameter), len(self._order))

    # ---- steps ---------------------------------------------------------------------------------

    def in_order(self, works: Iterable[Work]) -> list[Work]:
        """As the last forward used their weights; those that it did not use come last."""
        if self._order:
            self._last_order, self._order = self._order, {}
            self._entered.clear()
        last = len(self._last_order)
        return sorted(works, key=lambda work: self._last_order.get(id(work.parameter), last))

    def covered(self) -> set[int]:
        """Identities of the parameters whose uses by their modules wait."""
        found: set[int] = set()
        modules = self._hook_all()
        for module in modules:
            found.update(id(each) for each in module._parameters.values())
        for module in modules:
            if _is_compiled_in_place(module):
                found.difference_update(map(id, module.parameters()))
        return found - self._captured

    def start(self, pending: PendingStep) -> None:
        """Have a step under way; there is none."""
        pending.is_started = True
        self.pending = pending
        pending.start()

    def synchronize(self) -> PendingStep | None:
        """Block until no step is under way; the one that was. Raises what went wrong, once."""
        pending = self.pending
        if pending is not None:
            pending.wait()
            self.pending = None
        return pending


def can_overlap(work: Work, covered: set[int]) -> bool:
    """Whether every use of the weight and the gradient can be made to wait; Note [Overlap]."""
    parameter, gradient = work.parameter, work.gradient
    if not parameter.is_cuda or id(parameter) not in covered or not _is_alone(parameter):
        return False
    if work.pending is not None or gradient is not parameter.grad:
        return True
    return parameter.requires_grad and _is_of_one(gradient) and _is_alone(gradient)


def _before_it_is_added_to(parameter: torch.Tensor, _: torch.Tensor) -> None:
    """A hook of backward: autograd would write to ``.grad`` in C++."""
    _awaited.wait_for([parameter.grad])


def _is_of_one(gradient: torch.Tensor) -> bool:
    """Whether it is ``.grad`` of one tensor, and nobody in C++ has it, as an array of cupy's."""
    # Its object in Python, and ``.grad``.
    return type(gradient) is torch.Tensor and gradient._use_count() <= 2  # type: ignore[attr-defined]


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether no other tensor has its memory."""
    if not _awaited.can_await(tensor):
        return False
    storage = tensor.untyped_storage()
    # The tensor, and ``storage``.
    return int(torch._C._storage_Use_Count(storage._cdata)) <= 2


def _runs_children(module: nn.Module) -> bool:
    """Whether ``module`` may read the weights of its children without calling them."""
    return (
        isinstance(module, nn.MultiheadAttention | nn.DataParallel)
        or "forward" in module.__dict__
        or "_orig_mod" in module._modules  # Of torch.compile.
        or any(isinstance(child, torch.jit.ScriptModule) for child in module.children())
    )


def _is_compiled_in_place(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


class _Hook:
    """A forward pre-hook. A copy, as of a module that is copied or pickled, does nothing."""

    def __init__(self, overlap: Overlap | None = None) -> None:
        self._overlap = weakref.ref(overlap) if overlap is not None else None

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling() or self._overlap is None:
            return
        overlap = self._overlap()
        if overlap is not None:
            overlap.enter(module)

    def __reduce__(self) -> Any:
        return _Hook, ()


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _before_fork() -> None:
    """A child has no worker, so nothing may be under way in it."""
    for pending in list(_steps):
        if pending.is_started:
            pending.settle()


def _start_again() -> None:
    global _worker
    _worker = _executor()


def _report() -> None:
    """At the end of the process, when the worker has ended: as any error that nobody caught."""
    for pending in list(_steps):
        error = pending.unheard_error()
        if error is not None:
            sys.excepthook(type(error), error, error.__traceback__)


atexit.register(_report)
os.register_at_fork(before=_before_fork, after_in_child=_start_again)
