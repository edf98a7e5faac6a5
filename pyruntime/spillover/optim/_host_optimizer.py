"""The base of optimizers whose state lives in host memory: commits, and the step on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from spillover._core import HostPool
from spillover._errors import ConfigError, StateError
from spillover._layout import flat_view
from spillover._stalls import Timed
from spillover.optim._algorithms import Group, MomentSpec
from spillover.optim._disk_tier import Resumed
from spillover.optim._failures import check_capture
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import Anomalies
from spillover.optim._host_base import entry_of, named_parameters
from spillover.optim._host_checkpoints import HostCheckpoints
from spillover.optim._host_state import MASTER, REMAINDER, BlockwiseState, StateOptions
from spillover.optim._host_step import (
    explain,
    order_after_compute,
    reserve_staging,
    run,
    taken_by,
)
from spillover.optim._host_work import Work, check_gradient, check_parameter
from spillover.optim._overlap import Modules, Overlap, PendingStep, can_overlap
from spillover.optim._resuming import forget_living, note_living
from spillover.optim._state_store import StateArrays
from spillover.optim._tiers import TierOptions

_STEP = Timed("optimizer", "step")
_GO_ON = "Whatever waits for it next goes on with it, such as a second call of synchronize()."


class HostOptimizer(HostCheckpoints):
    """See the notes; a subclass says its algorithm and has a constructor with torch's arguments."""

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
        HostOutOfMemory, DiskFull, StorageError
            There is no memory for the state or for staging, or no room on disk for that of weights
            that were frozen; no weight, moment or step count has been changed then.
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

    def _step(self) -> None:
        self.synchronize()
        if self._disk is not None:
            self._disk.check()
        if self.gradients is not None:
            # Some may require gradients only now; their next ones leave.
            self.gradients.add(named_parameters(self.param_groups))
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
        entry = entry_of(self._raw_state, parameter)
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


def _frozen(group: Group) -> Group:
    """The options of a group as they are now: schedulers change them when ``step()`` is over."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return float(value)
        return tuple(map(plain, value)) if isinstance(value, tuple | list) else value

    return {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}


def _whole(specs: Iterable[MomentSpec], arrays: dict[str, Any]) -> StateArrays:
    return StateArrays(
        {spec.slot: _flat(arrays[spec.name]) for spec in specs},
        flat_view(arrays[MASTER]) if MASTER in arrays else None,
        flat_view(arrays[REMAINDER]) if REMAINDER in arrays else None,
    )


def _flat(array: Any) -> Any:
    return array.moment if isinstance(array, BlockwiseState) else flat_view(array)
