"""The base of optimizers whose state lives in host memory and whose step runs on the CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spillover._core import HostPool
from spillover._errors import ConfigError, StateError
from spillover._layout import flat_view
from spillover._settings import enabled
from spillover._sources import register
from spillover._stalls import Timed
from spillover.optim._algorithms import Algorithm, Group, MomentSpec
from spillover.optim._disk_entries import DiskEntries
from spillover.optim._disk_tier import DiskTier, Resumed, forget_living, note_living
from spillover.optim._failures import check_capture
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import Anomalies, OffloadedGradients, offload_gradients
from spillover.optim._host_entries import Entries
from spillover.optim._host_state import MASTER, REMAINDER, BlockwiseState, StateOptions
from spillover.optim._host_step import (
    Unsent,
    explain,
    order_after_compute,
    reserve_staging,
    run,
    taken_by,
)
from spillover.optim._host_work import Work, check_gradient, check_parameter
from spillover.optim._overlap import Modules, Overlap, PendingStep, can_overlap
from spillover.optim._progress import Progress
from spillover.optim._state_dictionaries import HostEntry
from spillover.optim._state_store import StateArrays
from spillover.optim._tiers import Tier, TierOptions, check_device_tier, tier_options

_STEP = Timed("optimizer", "step")
_GO_ON = "Whatever waits for it next goes on with it, such as a second call of synchronize()."

#: Options of ours that torch's classes do not take.
_OWN_OPTIONS = (
    "tier",
    "moments",
    "master",
    "pool",
    "offload_gradients",
    "gradient_anomalies",
    "overlap",
    "directory",
    "host_budget",
    "commit_every",
    "module",
    "write_limit",
)


@dataclass(frozen=True, kw_only=True)
class OptimizerStats:
    """Figures of one optimizer, in ``spillover.stats().others["optimizer"]``.

    Attributes
    ----------
    optimizer
        Its class.
    parameters, elements
        That require gradients, and how many numbers they are.
    host_bytes
        Of state, set aside for state, and of masters; without step counts and staging.
    disk_bytes
        Of state, weights and buffers, two slots of each.
    """

    optimizer: str
    parameters: int
    elements: int
    host_bytes: int
    disk_bytes: int = 0

    @property
    def bytes_per_parameter(self) -> dict[str, float]:
        """Of state between steps, by tier: on the device, on the host and on disk."""
        count = max(1, self.elements)
        return {
            "device": 0.0,
            "host": self.host_bytes / count,
            "disk": self.disk_bytes / count,
        }


@dataclass(frozen=True, eq=False)
class _Kept:
    """Hides a state tensor from torch's load_state_dict, which would cast it like the weight."""

    tensor: torch.Tensor


class HostOptimizer(torch.optim.Optimizer):
    """See the notes; a subclass says its algorithm and has a constructor with torch's arguments."""

    algorithm: ClassVar[Algorithm]
    #: Torch's class, which is made instead where Spillover is switched off.
    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give torch's own optimizer when Spillover is switched off."""
        made = cls.__dict__.get("torch_class")
        if made is not None and not enabled():
            return made(*args, **{k: v for k, v in kwargs.items() if k not in _OWN_OPTIONS})
        return super().__new__(cls)

    def __init__(
        self,
        params: Any,
        defaults: Group,
        *,
        tier: TierOptions,
        state: StateOptions,
        pool: HostPool | None,
        offload_gradients: bool,
        gradient_anomalies: Anomalies | None,
        overlap: Modules | None,
    ) -> None:
        state.check()
        if gradient_anomalies is not None and not offload_gradients:
            raise ConfigError("gradient_anomalies needs offload_gradients=True")
        self.algorithm.check(defaults)
        self._begin(state, pool, tier)
        self._is_made = False
        super().__init__(params, defaults)
        if self._disk is not None:
            self._disk.open(self.param_groups, pool)
            note_living(self)
        self._reserve(self.param_groups)
        self._is_made = True
        if offload_gradients:
            self._offload_gradients(gradient_anomalies)
        if overlap is not None:
            self._overlap = Overlap(overlap)

    def _begin(
        self, options: StateOptions, pool: HostPool | None, tier: TierOptions | None = None
    ) -> None:
        name = type(self).__name__
        self._entries = Entries(self.algorithm, options, pool, name)
        self._disk: DiskTier | None = None
        if tier is not None and tier.tier != "host":
            synchronize = weakref.WeakMethod(self.synchronize)
            self._entries = DiskEntries(self.algorithm, options, pool, name, synchronize)
            self._disk = DiskTier(tier, self._entries, name)
        self._progress = Progress()
        self._unsent = Unsent()
        register("optimizer", self, HostOptimizer.stats)

    @classmethod
    def _tier_options(cls, tier: Tier, *options: Any) -> TierOptions:
        check_device_tier(tier, cls.torch_class)
        return tier_options(tier, *options)

    # ---- what it has ---------------------------------------------------------------------------

    @property
    def gradients(self) -> OffloadedGradients | None:
        """The handle of gradients off the device; None unless ``offload_gradients`` was set."""
        found: OffloadedGradients | None = self.__dict__.get("_gradients")
        return found

    def stats(self) -> OptimizerStats:
        """Figures at this moment, also in :func:`spillover.stats`. Cheap; does not block."""
        trained = [
            parameter
            for group in self.__dict__.get("param_groups", ())
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        return OptimizerStats(
            optimizer=type(self).__name__,
            parameters=len(trained),
            elements=sum(parameter.numel() for parameter in trained),
            host_bytes=self._host_bytes(),
            disk_bytes=0 if self._disk is None else self._disk.disk_bytes,
        )

    def _host_bytes(self) -> int:
        if self._disk is not None:
            return self._disk.host_bytes
        return self._entries.memory.size_bytes()

    @property
    def disk_folders(self) -> tuple[str, ...]:
        """Absolute paths of ``directory``; none with ``tier="host"``."""
        return () if self._disk is None else self._disk.options.folders

    # ---- commits -------------------------------------------------------------------------------

    def commit(self, extra: Any = None) -> int:
        """Make state, weights and all that :func:`resume` needs durable, all or nothing.

        Blocks until weights have been copied and the disks have flushed.

        Parameters
        ----------
        extra
            What you need to go on: the state of a scheduler, the place in the data. Numbers, text,
            bytes, tensors and arrays, in lists, tuples and dicts.

        Returns
        -------
        The number of the commit, from 1.

        Raises
        ------
        StateError
            State is not on disk; the directory has a commit that was not resumed; a step has failed
            and was not repeated.
        ConfigError
            ``extra``, or an option of a group, is something else, or too large.
        StorageError, DiskFull
            It could not be made durable; the last commit is what it was. Call it again, or
            :func:`resume`, which goes back to that one.
        """
        if self._disk is None:
            raise StateError("commit() needs tier='disk' or tier='auto'; state is on the host")
        self.synchronize()
        if self._progress and not self._progress.is_whole:
            raise StateError(
                "the last step has failed and updated a part; repeat it with the same gradients, "
                "or go back to the last commit with spillover.optim.resume()"
            )
        self._unsent.send()
        return self._disk.commit(self.param_groups, self._raw_state, extra)

    def close(self) -> None:
        """Let go of the directory, so that another optimizer may have it. Blocks.

        What was not committed is forgotten, and steps raise StateError from then on. With
        ``tier="host"`` there is nothing to do. The end of the process does the same.
        """
        try:
            self.synchronize()
        finally:
            if self._disk is not None:
                forget_living(self)
                self._disk.close()

    def resume(self) -> Resumed | None:
        """See :func:`spillover.optim.resume`."""
        if self._disk is None:
            raise StateError("resume() needs tier='disk' or tier='auto'; state is on the host")
        # A step that failed is undone.
        with contextlib.suppress(OSError):
            self.synchronize()
        found = self._disk.resume(self)
        if found is not None:
            self._progress.clear()
            self._unsent.forget()
        return found

    def _offload_gradients(self, anomalies: Anomalies | None) -> None:
        self._gradients = offload_gradients(_named(self.param_groups), anomalies=anomalies)

    @property
    def state(self) -> Any:
        """What torch's optimizers have under this name. Blocks as :meth:`synchronize`."""
        self.synchronize()
        return self._raw_state

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    @property
    def _raw_state(self) -> Any:
        return self.__dict__["state"]

    # ---- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see the class for what they and their options may be.

        Raises
        ------
        ConfigError
            An option is out of range, or a parameter cannot be updated. Nothing is added.
        HostOutOfMemory
            There is no memory for their state or gradients. Nothing is added.
        """
        self.synchronize()
        self.algorithm.check(param_group)
        params = param_group.get("params", ())
        if not isinstance(params, torch.Tensor | set):  # torch refuses a set.
            params = list(params)
            param_group["params"] = params
        known: set[int] = set()
        for entry in [params] if isinstance(params, torch.Tensor) else params:
            tensor = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(tensor, torch.Tensor):
                check_parameter(tensor, self.algorithm.name)
                if id(tensor) in known:
                    shape = tuple(tensor.shape)
                    raise ConfigError(f"a parameter of shape {shape} is twice in one group")
                known.add(id(tensor))
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self._is_made:
                self._reserve(self.param_groups[-1:])
            if self.gradients is not None:
                self.gradients.add(_named(self.param_groups))
        except BaseException:
            del self.param_groups[-1]
            self._entries.memory.forget_all_but(
                each for group in self.param_groups for each in group["params"]
            )
            raise

    def _check_group(self, group: Group) -> None:
        """Check the options of a whole group; subclasses add what options must be together."""
        self.algorithm.check(group)

    @torch.no_grad()
    def _reserve(self, groups: Iterable[Group]) -> None:
        """Have the memory of all that will have state, and state that is there from the start."""
        trained = [
            (parameter, group)
            for group in groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.numel() > 0
        ]
        self._entries.reserve(trained)
        if self.algorithm.has_initial_state:
            for parameter, group in trained:
                entry = self.state[parameter] = _entry_of(self.state, parameter)
                self._entries.complete_moments(parameter, group, entry)
                # So that a checkpoint that is loaded into the state has its masters, too.
                self._entries.complete_master(parameter, group, entry)

    # ---- checkpoints ---------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose gradients are offloaded where ours are.

        They do not overlap, as they know no module.
        """
        if self._disk is not None:
            raise StateError(
                f"a {type(self).__name__} with state on disk cannot be copied or pickled; use "
                "state_dict(), or commit() and spillover.optim.resume()"
            )
        self.synchronize()
        state: dict[str, Any] = super().__getstate__()
        state["host_options"] = self._entries.options
        if self.gradients is not None:
            state["gradient_anomalies"] = self.gradients.anomalies
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or unpickled state, in host memory and in our forms."""
        options: StateOptions | None = state.pop("host_options", None)
        is_offloaded = "gradient_anomalies" in state
        anomalies = state.pop("gradient_anomalies", None)
        if options is not None:
            self._begin(options, None)
        groups: list[Group] = state["param_groups"]
        for group in groups:
            self._complete_group(group)
            self._check_group(group)
        entries: dict[Any, Any] = state["state"]
        parameters = [(each, group) for group in groups for each in group["params"]]
        found = self._entries.take_over(
            [
                (each, group, {k: _shown(v) for k, v in entries.get(each, {}).items()})
                for each, group in parameters
            ]
        )
        for (parameter, _), entry in zip(parameters, found, strict=True):
            if parameter in entries:
                entries[parameter] = entry
        super().__setstate__(state)
        self._progress.clear()
        self._is_made = True
        if is_offloaded:
            self._offload_gradients(anomalies)

    def _complete_group(self, group: Group) -> None:
        """Give a group of a checkpoint what it has not, as torch's classes do."""
        for key, value in (self.algorithm.newer_options | self.algorithm.torch_options).items():
            group.setdefault(key, value)
        # They say how torch computed; the step on the host computes as it does.
        for key in {"capturable", "differentiable"} & group.keys():
            group[key] = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's; it is converted to the forms of ours.

        Raises
        ------
        ConfigError
            It is of another class, or does not fit the parameters.
        HostOutOfMemory
            There is no memory for it. Nothing is loaded in either case.
        """
        self.synchronize()
        if self._disk is not None:
            self._disk.check()

        def hide(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            self._check_kind(loaded)
            hidden = {
                key: {
                    name: _Kept(value) if isinstance(value, torch.Tensor) else value
                    for name, value in entry.items()
                }
                for key, entry in loaded["state"].items()
            }
            return {**loaded, "state": hidden}

        # Registered last, so that it runs after the hooks of users, which see the tensors.
        hook = self.register_load_state_dict_pre_hook(hide)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _check_kind(self, loaded: dict[str, Any]) -> None:
        # torch adds "differentiable" to the defaults of whatever has been loaded before.
        known = {*self.algorithm.newer_options, *self.algorithm.torch_options, "differentiable"}
        for group in loaded["param_groups"]:
            missing = [name for name in self.defaults if name not in group and name not in known]
            if missing:
                raise ConfigError(
                    f"this is no state of {self.algorithm.name}: its groups have no "
                    f"{', '.join(missing)}"
                )

    def state_dict(self) -> dict[str, Any]:
        """As of torch's optimizers: tensors of the parameters' shapes, which are the state itself.

        What is kept in 8 bits, or split, is a float32 copy in pageable memory.
        """

        def unpack(optimizer: torch.optim.Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
            parameters = [each for group in self.param_groups for each in group["params"]]
            state = {
                key: self._entries.unpacked(parameters[key], entry)
                if isinstance(key, int)
                else entry
                for key, entry in packed["state"].items()
            }
            return {**packed, "state": state}

        # First, so that the hooks of users see tensors.
        hook = self.register_state_dict_post_hook(unpack, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    # ---- the step ------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Parameters
        ----------
        closure
            Computes the loss again and returns it, as for torch's optimizers.

        Raises
        ------
        ConfigError
            A gradient is sparse or complex, or an option is wrong; nothing has been changed then.
        HostOutOfMemory
            There is no memory for the state or for staging; no weight, moment or step count has
            been changed then.
        StateError
            The current stream records a CUDA graph.
        RuntimeError
            A CUDA call failed on the way. A note on the error says what has been updated; a step
            that is repeated with the same gradients updates the rest, and nothing twice.
        """
        check_capture(f"{type(self).__name__}.step()", "the update runs on the host")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _STEP.call(self._step)
        return loss

    def synchronize(self) -> None:
        """Block until the last step's updates are done and the weights in place.

        Only with ``overlap`` is there anything to wait for. What uses weights, gradients or state
        in Python waits by itself; what does not is listed in ``docs/optimizer.md``.

        Raises
        ------
        RuntimeError
            The step failed, and nobody has heard of it yet. Call this again to finish it.
        """
        overlap: Overlap | None = self.__dict__.get("_overlap")
        ended = overlap.synchronize() if overlap is not None else None
        if ended is not None and ended.has_failed:
            self._progress.remember_all(ended.taken)

    def _step(self) -> None:
        self.synchronize()
        if self._disk is not None:
            self._disk.check()
        if self.gradients is not None:
            # Some may require gradients only now; their next ones leave.
            self.gradients.add(_named(self.param_groups))
            self.gradients.check()
        todo = self._todo()
        self._entries.reserve(todo)
        self._unsent.send()
        works: list[Work] = []
        beside: dict[Work, None] = {}
        pending: PendingStep | None = None
        try:
            skipped = self._prepare_all(todo, works)
            is_over = self._progress.is_whole and skipped > 0 and not works
            beside, awaited = self._beside(works)
            self._run_now([work for work in works if work not in beside], skipped)
            if beside:
                pending = PendingStep(
                    list(beside),
                    awaited,
                    run=self._run_beside,
                    note_sent=self._note_written,
                    taken=taken_by(works),
                )
                self._overlap.start(pending)
        finally:
            is_started = pending is not None and pending.is_started
            for work in works:
                if work.pending is not None and not (is_started and work in beside):
                    work.pending.release()
            if self.gradients is not None:
                self.gradients.collect()
        if pending is not None:
            pending.wait_for_others()
        if self._disk is not None:
            self._disk.step_is_over(self, counts=not is_over)

    def _prepare_all(self, todo: list[tuple[torch.Tensor, Group]], works: list[Work]) -> int:
        """Append what there is to do; returns how many parameters are updated already."""
        frozen: dict[int, Group] = {}
        for parameter, group in todo:
            done = self._progress.done(parameter)
            if done < parameter.numel():
                if id(group) not in frozen:
                    frozen[id(group)] = _frozen(group)
                works.append(self._prepare(parameter, frozen[id(group)], done))
        return len(todo) - len(works)

    def _run_now(self, works: list[Work], skipped: int) -> None:
        groups: dict[int, list[Work]] = {}
        for work in works:
            groups.setdefault(id(work.group), []).append(work)
        try:
            if works:
                store = self._entries.store
                run(self.algorithm, list(groups.values()), self._unsent, self._finish, store)
        except BaseException as error:
            for work in works:
                if work.done:
                    self._progress.remember(work.parameter, work.done)
            explain(error, works, skipped)
            raise
        self._progress.clear()
        for work in works:
            self._note_written(work)

    def _beside(self, works: list[Work]) -> tuple[dict[Work, None], list[Work]]:
        """What the worker is to do, in its order, and those of them that are awaited.

        Weights on a device whose uses cannot be made to wait come first, and are waited for.
        """
        overlap: Overlap | None = self.__dict__.get("_overlap")
        if overlap is None:
            return {}, []
        covered = overlap.covered()
        awaited = overlap.in_order(work for work in works if can_overlap(work, covered))
        if not awaited:
            return {}, []
        chosen = set(awaited)
        others = [work for work in works if work.parameter.is_cuda and work not in chosen]
        beside = dict.fromkeys(others + awaited)
        reserve_staging(list(beside))
        order_after_compute(list(beside))
        return beside, awaited

    def _run_beside(self, pending: PendingStep) -> None:
        """On the worker, and once more after a failure."""

        def finish(work: Work) -> None:
            self._finish(work)
            pending.used(work)

        try:
            self._send_again(pending)
            left = [work for work in pending.works if work.done < work.parameter.numel()]
            run(self.algorithm, [left], self._unsent, finish, self._entries.store, pending)
        except BaseException as error:
            explain(error, pending.works, 0, _GO_ON)
            raise

    def _send_again(self, pending: PendingStep) -> None:
        """Send what a failed attempt could not."""
        self._unsent.send()
        done = [work for work in pending.works if work.done == work.parameter.numel()]
        for device in {work.parameter.device for work in done}:
            torch.cuda.current_stream(device).synchronize()
        for work in done:
            if not pending.is_sent(work):
                pending.sent(work, None)

    def _todo(self) -> list[tuple[torch.Tensor, Group]]:
        """Checked parameters that have gradients, with their groups."""
        todo = []
        for group in self.param_groups:
            if group.get("capturable"):
                # torch.compile sets it, where it traces what reads the groups.
                group["capturable"] = False
            self._check_group(group)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel() > 0:
                    # Moved or converted since it was added, perhaps.
                    check_parameter(parameter, self.algorithm.name)
                    check_gradient(parameter, parameter.grad, self.algorithm.name)
                    todo.append((parameter, group))
        return todo

    def _prepare(self, parameter: torch.Tensor, group: Group, done: int) -> Work:
        entry = _entry_of(self._raw_state, parameter)
        late = self._entries.complete_moments(parameter, group, entry)
        if done == 0:
            self._entries.complete_master(parameter, group, entry)
        if entry:
            self._raw_state[parameter] = entry
        specs = self.algorithm.moments(group)
        pending = pending_gradient(parameter)
        gradient = parameter.grad if pending is None else pending.flat
        assert gradient is not None
        if pending is None and tuple(gradient.stride()) != tuple(parameter.stride()):
            gradient = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
            ).copy_(gradient)
        arrays = {**entry, **late}
        is_split = REMAINDER in self._entries.wanted(parameter, group)
        return Work(
            parameter=parameter,
            gradient=gradient,
            group=group,
            entry=entry,
            late=late,
            has_master=MASTER in entry and not is_split,
            has_remainder=is_split,
            arrays=None if self._disk is not None else _whole(specs, arrays),
            needs_weight=self._entries.needs_weight(parameter),
            loaded_master=self._entries.loaded_master(parameter, entry),
            number=self._entries.number(entry, late),
            pending=pending,
            done=done,
        )

    def _finish(self, work: Work) -> None:
        if work.loaded_master is not None:
            del work.entry[MASTER]
            work.loaded_master = None
            self._entries.complete_master(work.parameter, work.group, work.entry)
        work.entry.update(work.late)
        if work.late:
            self._raw_state[work.parameter] = work.entry
        if self._entries.counts_steps:
            work.entry["step"].fill_(work.number)

    def _note_written(self, work: Work) -> None:
        if work.is_low:
            self._entries.has_written(work.parameter)


def _named(groups: list[Group]) -> list[tuple[str, torch.Tensor]]:
    """All parameters, by their names where the optimizer was given them."""
    return [
        (group["param_names"][index] if "param_names" in group else f"{number}.{index}", parameter)
        for number, group in enumerate(groups)
        for index, parameter in enumerate(group["params"])
    ]


def _frozen(group: Group) -> Group:
    """The options of a group as they are now: schedulers change them when ``step()`` is over."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return float(value)
        return tuple(map(plain, value)) if isinstance(value, tuple | list) else value

    return {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}


def _entry_of(state: Mapping[torch.Tensor, Any], parameter: torch.Tensor) -> HostEntry:
    """The state of a parameter, empty where there is none."""
    found = state.get(parameter, {})
    return found if isinstance(found, HostEntry) else HostEntry(found)


def _whole(specs: Iterable[MomentSpec], arrays: dict[str, Any]) -> StateArrays:
    return StateArrays(
        {spec.slot: _flat(arrays[spec.name]) for spec in specs},
        flat_view(arrays[MASTER]) if MASTER in arrays else None,
        flat_view(arrays[REMAINDER]) if REMAINDER in arrays else None,
    )


def _flat(array: Any) -> Any:
    return array.moment if isinstance(array, BlockwiseState) else flat_view(array)


def _shown(value: Any) -> Any:
    return value.tensor if isinstance(value, _Kept) else value
