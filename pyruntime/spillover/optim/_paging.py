"""Has any torch optimizer keep its state off the device: ``page`` and ``unpage``.

Note [The paged class]
----------------------
``page`` changes the optimizer's class to one that derives from it and has its name, made once for
each class. So the object, its hooks, schedulers that hold it and ``isinstance`` stay what they are,
and whoever calls ``optimizer.step`` gets the paged one. A bound ``step`` that somebody took before
``page`` is the old one: it would find its state gone, so a step hook refuses it. Schedulers take
it, too, but leave it on the optimizer, where ``page`` puts the new one in its place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from spillover._disk import Folder
from spillover._errors import ConfigError, StateError
from spillover._settings import enabled
from spillover._sources import register
from spillover._stalls import Timed
from spillover.optim._failures import check_capture
from spillover.optim._paging_classes import Group, Rules, check_group, check_optimizer
from spillover.optim._paging_load import adopt, hidden, keep
from spillover.optim._paging_state import Entry, States, is_large, leaves
from spillover.optim._paging_step import Paging
from spillover.optim._paging_store import PagingOptions, StateStore, Tier, paging_options

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)

_STEP = Timed("optimizer paging", "step")
_PAGING = "_spillover_paging"
_MOVES = "its state moves between host and device"


@dataclass(frozen=True, kw_only=True)
class PagingStats:
    """Figures of one paged optimizer, in ``spillover.stats().others["paging"]``.

    Attributes
    ----------
    optimizer, tier
        Its class, and what it was paged to.
    in_buckets
        Whether steps bring state in buckets, or whole.
    host_bytes, disk_bytes
        Of state, between steps.
    reserved_bytes
        Host memory that is set aside for state that the first step will make.
    buckets, bucket_bytes_max
        Of the last step; 0 where it was whole.
    """

    optimizer: str
    tier: str
    in_buckets: bool
    host_bytes: int
    disk_bytes: int
    reserved_bytes: int
    buckets: int
    bucket_bytes_max: int


def page(
    optimizer: _Optimizer,
    tier: Tier = "host",
    *,
    directory: Folder | Sequence[Folder] | None = None,
    host_budget: int | str | None = None,
    bucket_bytes: int | str = "64MiB",
    write_limit: int | str | None = None,
) -> _Optimizer:
    """Have an optimizer's state live off the device and pass through it around ``step()``.

    The update is the optimizer's own, on the device, so its results are what they would be, bit for
    bit. torch's Adadelta, Adafactor, Adagrad, Adam, AdamW, Adamax, ASGD, Muon, NAdam, RAdam,
    RMSprop, Rprop and SGD, and classes that derive from them without a ``step`` of their own, are
    updated in buckets of parameters, while the next bucket arrives and the last one leaves. Any
    other class has all of its state on the device during ``step()``, and none between steps.

    Parameters
    ----------
    optimizer
        It is changed and returned. Its parameters may be on several CUDA devices; those on the host
        are left alone. State that it has moves at once.
    tier
        ``"host"``: pinned host memory. ``"disk"``: files in ``directory`` that are gone with the
        process, through 64 MiB of pinned memory a device. ``"auto"``: the host until
        ``host_budget`` is reached, then the disk.
    directory
        A folder, or several on different disks.
    host_budget
        The most bytes of state in host memory. None: what ``SPILLOVER_HOST_LIMIT`` or the machine
        allows the process.
    bucket_bytes
        The most bytes of state in one bucket; one parameter's state may be more. At most three
        buckets are on the device, or one that is larger than three.
    write_limit
        The most bytes that may be written to disk, to spare flash memory.

    Returns
    -------
    The same object. It is still an instance of its class; schedulers, GradScaler, hooks, closures,
    ``add_param_group``, ``state_dict``, ``load_state_dict``, pickling and copying work as before.
    :func:`unpage` undoes it. With ``SPILLOVER=0`` nothing is changed.

    Raises
    ------
    ConfigError
        An argument is wrong, or the optimizer cannot be paged; the message says why. LBFGS,
        SparseAdam, ``differentiable=True``, tensor subclasses and optimizers that keep state
        elsewhere than in ``optimizer.state`` cannot.
    HostOutOfMemory, DiskFull, StorageError
        There is no room for the state, that to come included. Nothing has been changed then.
    StateError
        It is paged already, or the current stream records a CUDA graph.

    Notes
    -----
    ``step()`` launches copies and updates and does not wait for them; kernels launched on the
    current stream after it see the new weights, and the memory of buckets is free for what is
    allocated after it. It blocks for reads from disk, for copies to there, and where the program
    holds state tensors; it does not hold the interpreter's lock while it waits.

    Between steps ``optimizer.state[parameter]`` and ``state_dict()`` have host tensors, which are
    the state itself: reading a key waits for the copy that fills the tensor, and what is written
    into one is what the next step uses. While the program holds them, steps wait until they are
    filled. Small state, such as step counts, stays where the optimizer keeps it.

    An error in ``step()`` leaves no state half changed; notes on it say how many parameters have
    been updated, and a repeated step updates the others. A step cannot be captured in a CUDA graph.

    Examples
    --------
    >>> optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
    >>> spillover.optim.page(optimizer, tier="auto", host_budget="32GiB", directory="/nvme0/spill")
    """
    if not enabled():
        return optimizer
    if _PAGING in vars(optimizer):
        raise StateError("this optimizer is paged already; call spillover.optim.unpage() before")
    options = paging_options(tier, directory, host_budget, bucket_bytes, write_limit)
    check_optimizer(optimizer)
    _check_step(optimizer)
    check_capture("page()", _MOVES)
    base = type(optimizer)
    paging = Paging(StateStore(options), Rules(base))
    existing = _state_bytes(optimizer)
    _reserve(paging, optimizer, optimizer.param_groups, existing)
    states = paging.take_over(optimizer.state)
    optimizer.__class__ = _paged_class(base)  # type: ignore[assignment]
    optimizer.state = states
    vars(optimizer)[_PAGING] = paging
    _attach(optimizer, paging)
    return optimizer


def unpage(optimizer: _Optimizer) -> _Optimizer:
    """Bring the state of a paged optimizer back to its devices, and undo :func:`page`.

    Returns the same object. Blocks for reads from disk.

    Raises
    ------
    StateError
        It is not paged.
    torch.OutOfMemoryError, StorageError
        The state does not fit, or cannot be read. The optimizer is still paged then.
    """
    if not enabled() and _PAGING not in vars(optimizer):
        return optimizer
    paging = _paging_of(optimizer)
    state = paging.bring_back(optimizer.state)  # type: ignore[arg-type]
    optimizer.__class__ = paging.rules.base  # type: ignore[assignment]
    optimizer.state = state
    del vars(optimizer)[_PAGING]
    for handle in paging.handles:
        handle.remove()
    _renew_step(optimizer)
    paging.store.close()
    return optimizer


# ---- the paged class -----------------------------------------------------------------------------


class _Paged(torch.optim.Optimizer):
    """What is different in a paged optimizer; see Note [The paged class]."""

    def state_dict(self) -> dict[str, Any]:
        """In torch's format; its tensors are the state itself, on the host."""
        found = super().state_dict()
        state = found.get("state")
        if isinstance(state, dict):
            found["state"] = {
                key: dict(entry) if isinstance(entry, Entry) else entry
                for key, entry in state.items()
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class; it is copied to its place off the device."""
        rules = _paging_of(self).rules
        is_torchs = rules.base.load_state_dict is torch.optim.Optimizer.load_state_dict
        if not (rules.in_buckets and is_torchs):
            super().load_state_dict(state_dict)
            return
        # Registered last, so that it runs after the hooks of users, which see the tensors.
        hook = self.register_load_state_dict_pre_hook(hidden)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or unpickled state; nothing is changed where that fails."""
        paging = _paging_of(self)
        names = ("state", "param_groups", "defaults")
        before = {name: vars(self)[name] for name in names if name in vars(self)}
        try:
            super().__setstate__(state)
            old = before.get("state")
            states = adopt(paging, self.state, old if isinstance(old, States) else None)
        except BaseException:
            vars(self).update(before)
            raise
        self.state = states
        if not paging.handles:
            _attach(self, paging)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with room for their state; nothing is added where that fails."""
        super().add_param_group(param_group)
        paging = _paging_of(self)
        try:
            check_group(type(self).__name__, self.param_groups[-1])
            _reserve(paging, self, self.param_groups[-1:], [])
        except BaseException:
            self.param_groups.pop()
            raise

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        paging = _paging_of(self)
        state = dict(super().__getstate__())
        state["state"] = keep(self.state)  # type: ignore[arg-type]
        return _rebuild, (paging.rules.base, paging.store.options), state


def _rebuild(base: type[torch.optim.Optimizer], options: PagingOptions) -> torch.optim.Optimizer:
    """An optimizer that waits for ``__setstate__``: of a pickle, or a copy."""
    kind = _paged_class(base)
    optimizer = kind.__new__(kind)
    vars(optimizer)[_PAGING] = Paging(StateStore(options), Rules(base))
    return optimizer


_paged_classes: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {}


def _paged_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class in place of ``base``; see Note [The paged class]."""
    if base not in _paged_classes:
        _paged_classes[base] = _make_class(base)
    return _paged_classes[base]


def _make_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    # torch's own wrapper calls the hooks, once a step, and names the step for its profiler.
    hooked = torch.optim.Optimizer.profile_hook_step(_step)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @functools.wraps(base.step)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        paging = _paging_of(self)
        if paging.is_entered:
            raise StateError(f"{base.__name__}.step() was called from within itself")
        paging.is_entered = True
        try:
            return hooked(self, *args, **kwargs)
        finally:
            paging.is_entered = False

    step.hooked = True  # type: ignore[attr-defined]
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "step": step,
    }
    return type(base.__name__, (_Paged, base), names)


def _step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
    check_capture("step() of a paged optimizer", _MOVES)
    paging = _paging_of(self)
    for group in self.param_groups:
        check_group(type(self).__name__, group)
    own: Any = paging.rules.base.step
    while getattr(own, "hooked", False) and hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    if not paging.rules.in_buckets:
        return _STEP.call(lambda: paging.step_whole(self, lambda: own(self, *args, **kwargs)))
    return _step_in_buckets(self, paging, own, *args, **kwargs)


def _step_in_buckets(
    self: torch.optim.Optimizer, paging: Paging, own: Any, closure: Any = None
) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    _STEP.call(lambda: paging.step_in_buckets(self, lambda: own(self)))
    return loss


# ---- attaching -----------------------------------------------------------------------------------


def _paging_of(optimizer: torch.optim.Optimizer) -> Paging:
    paging = vars(optimizer).get(_PAGING)
    if not isinstance(paging, Paging):
        raise StateError("this optimizer is not paged; spillover.optim.page() does that")
    return paging


def _attach(optimizer: torch.optim.Optimizer, paging: Paging) -> None:
    paging.handles = [
        optimizer.register_step_pre_hook(_refuse_other_steps),
        register("paging", optimizer, _stats),
    ]
    _renew_step(optimizer)


def _refuse_other_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _paging_of(optimizer).is_entered:
        raise StateError(
            "this step() was taken from the optimizer before spillover.optim.page(), and knows "
            "nothing of its state's place; page the optimizer first, or take it again"
        )


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"optimizer.step has been replaced by {step!r}, which would go past paging; call "
            "spillover.optim.page() before what replaces it"
        )


def _renew_step(optimizer: torch.optim.Optimizer) -> None:
    """Have a scheduler's wrapper, which lies on the optimizer, call the step of its class now."""
    if "step" not in vars(optimizer):
        return
    del vars(optimizer)["step"]
    reference = weakref.ref(optimizer)
    own = type(optimizer).step

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        found: Any = reference()
        found._opt_called = True
        return own.__get__(found, type(found))(*args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


def _state_bytes(optimizer: torch.optim.Optimizer) -> list[int]:
    """Of each tensor of the state that leaves the device."""
    seen = {}
    for entry in optimizer.state.values():
        for leaf in leaves(entry):
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda and is_large(leaf):
                seen[id(leaf)] = leaf.nbytes
    return list(seen.values())


def _reserve(
    paging: Paging,
    optimizer: torch.optim.Optimizer,
    groups: Iterable[Group],
    existing: list[int],
) -> None:
    """Have room for the state that there is, and for what the first step will make."""
    sizes = list(existing)
    count = 0
    for group in groups:
        for parameter in group["params"]:
            count += 1
            if parameter.is_cuda and parameter.requires_grad and not optimizer.state.get(parameter):
                sizes += paging.rules.expected(group, parameter)
    name = paging.rules.base.__name__
    paging.store.reserve(sizes, f"the state of {name} for {count} parameters")


def _stats(optimizer: torch.optim.Optimizer) -> PagingStats:
    paging = _paging_of(optimizer)
    parked = list(paging.states.parked())
    return PagingStats(
        optimizer=paging.rules.base.__name__,
        tier=paging.store.options.tier,
        in_buckets=paging.rules.in_buckets,
        host_bytes=sum(each.size_bytes for each in parked if each.host is not None),
        disk_bytes=sum(each.size_bytes for each in parked if each.host is None),
        reserved_bytes=paging.store.reserved_bytes,
        buckets=len(paging.buckets),
        bucket_bytes_max=max((bucket.size_bytes for bucket in paging.buckets), default=0),
    )
