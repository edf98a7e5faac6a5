"""One step of a paged optimizer: which state is on the device when, and what a failure leaves.

Note [Failed steps]
-------------------
The state of a bucket changes in its place off the device, and in the dictionaries, when its update
has been launched. A failure before that leaves both as they were, and step counts, which updates
change where they are, are put back. Buckets before the one that failed are updated then, and those
behind it are not. Until a step has come to its end, the gradients that it has used are remembered
with their versions: when a step is repeated with the same gradients it leaves those
parameters out, and so finishes the one that failed. Where state cannot be stored any more, as on a
full disk, it goes to pageable host memory, and the step ends with the error behind that bucket.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spillover._errors import ConfigError
from spillover._settings import logger
from spillover.optim._failures import note
from spillover.optim._gradient_placeholder import fetched_gradients
from spillover.optim._paging_classes import Group, Rules
from spillover.optim._paging_state import (
    Entry,
    Parked,
    States,
    is_large,
    is_movable,
    leaves,
    map_leaves,
)
from spillover.optim._paging_store import StateStore
from spillover.optim._paging_transfer import Pair, Transfers, Transit
from spillover.optim._progress import Progress

#: Runs the optimizer's own step without its hooks.
Inner = Callable[[], Any]


class Bucket:
    """Parameters that are updated together, and the bytes of their state on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parameters: list[torch.Tensor] = []
        self.size_bytes = 0


class Paging:
    """The steps of one optimizer."""

    def __init__(self, store: StateStore, rules: Rules) -> None:
        self.store = store
        self.rules = rules
        self.is_entered = False
        self.states = States()
        #: Of what was registered for this optimizer.
        self.handles: list[Any] = []
        #: Of the last step.
        self.buckets: list[Bucket] = []
        self._transfers = Transfers(store)
        # Of an unfinished step; see Note [Failed steps].
        self._progress = Progress()
        self._has_warned = False

    def step_in_buckets(self, optimizer: torch.optim.Optimizer, inner: Inner) -> None:
        """Update the parameters that have gradients, a bucket at a time."""
        if not _is_separable(optimizer):
            self.step_whole(optimizer, inner)
            return
        state: States = optimizer.state  # type: ignore[assignment]
        decisions = [self.rules.decisions(group) for group in optimizer.param_groups]
        plan = self.buckets = self._plan(optimizer)
        try:
            with self._transfers.session():
                self._transfers.expect(
                    each for bucket in plan for each in _parked(state, bucket.parameters)
                )
                arrived: Transit | None = None
                for index, bucket in enumerate(plan):
                    transit = arrived or self._bring(state, bucket)
                    after = plan[index + 1] if index + 1 < len(plan) else None
                    arrived = self._bring_ahead(state, after) if after is not None else None
                    groups = _groups_of(optimizer, bucket, decisions)
                    self._update(optimizer, inner, bucket.parameters, groups, [transit])
        except BaseException as error:
            done = sum(
                1 for bucket in plan for each in bucket.parameters if self._progress.is_done(each)
            )
            _explain(error, done, sum(len(bucket.parameters) for bucket in plan))
            raise
        self._progress.clear()

    def step_whole(self, optimizer: torch.optim.Optimizer, inner: Inner) -> Any:
        """Run the optimizer's step with all of its state on the device."""
        state: States = optimizer.state  # type: ignore[assignment]
        self.buckets = []
        keys = list(state)
        try:
            with self._transfers.session():
                arrived = self._bring_all(state, keys)
                return self._update(optimizer, inner, keys, None, arrived)
        except BaseException as error:
            _explain(error, len(self._progress), len(self._progress))
            raise
        finally:
            self._progress.clear()

    def take_over(self, local: dict[Any, Any]) -> States:
        """Send state that is on devices to its places; nothing is changed where that fails."""
        states = States()
        with self._transfers.session():
            self._put_away(states, [], local, [])
        self.states = states
        return states

    def bring_back(self, state: States) -> defaultdict[Any, Any]:
        """All of the state, on its devices; what is off them stays as it is."""
        keys = list(state)
        with self._transfers.session():
            arrived = self._bring_all(state, keys)
            for transit in arrived:
                self._transfers.await_arrival(transit)
            here = {key: each for transit in arrived for key, each in transit.tensors.items()}
            return _on_device(state, keys, here)

    def _bring_all(self, state: States, keys: list[Any]) -> list[Transit]:
        wanted: dict[torch.device, dict[int, Parked]] = {}
        for key in keys:
            for parked in _parked(state, [key]):
                wanted.setdefault(_device_of(parked, key), {})[id(parked)] = parked
        self._transfers.expect(_parked(state, keys))
        return [
            self._transfers.bring(device, list(parked.values()), 0)
            for device, parked in wanted.items()
        ]

    # ---- buckets -------------------------------------------------------------------------------

    def _plan(self, optimizer: torch.optim.Optimizer) -> list[Bucket]:
        found: list[Bucket] = []
        last: dict[torch.device, Bucket] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self._progress.is_done(parameter):
                    continue
                size_bytes = self._state_bytes(optimizer, group, parameter)
                bucket = last.get(parameter.device)
                limit = self.store.options.bucket_bytes
                if bucket is None or (bucket.size_bytes and bucket.size_bytes + size_bytes > limit):
                    bucket = last[parameter.device] = Bucket(parameter.device)
                    found.append(bucket)
                bucket.parameters.append(parameter)
                bucket.size_bytes += size_bytes
        # One device after the other: a pipeline is worth something if it is not interrupted.
        return sorted(found, key=lambda bucket: str(bucket.device))

    def _state_bytes(
        self, optimizer: torch.optim.Optimizer, group: Group, parameter: torch.Tensor
    ) -> int:
        if not parameter.is_cuda:
            return 0
        if optimizer.state.get(parameter):
            states: States = optimizer.state  # type: ignore[assignment]
            found = sum(each.size_bytes for each in _parked(states, [parameter]))
            if found:
                return found
        return sum(self.rules.expected(group, parameter))

    def _bring(self, state: States, bucket: Bucket) -> Transit:
        wanted = {id(each): each for each in _parked(state, bucket.parameters)}
        return self._transfers.bring(bucket.device, list(wanted.values()), bucket.size_bytes)

    def _bring_ahead(self, state: States, bucket: Bucket) -> Transit | None:
        """Have a bucket come while another one is updated; None: there is no room for both."""
        if bucket.device.type != "cuda":
            return None
        if not self._transfers.has_room(bucket.device, bucket.size_bytes):
            return None
        try:
            return self._bring(state, bucket)
        except torch.OutOfMemoryError:
            return None

    # ---- the update ----------------------------------------------------------------------------

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        inner: Inner,
        keys: list[Any],
        groups: list[Group] | None,
        arrived: list[Transit],
    ) -> Any:
        for transit in arrived:
            self._transfers.await_arrival(transit)
        state: States = optimizer.state  # type: ignore[assignment]
        here = {key: each for transit in arrived for key, each in transit.tensors.items()}
        local = _on_device(state, keys, here)
        counts = _Counts(local)
        parameters = [
            parameter
            for group in (optimizer.param_groups if groups is None else groups)
            for parameter in group["params"]
        ]
        all_groups = optimizer.param_groups
        optimizer.state = local
        if groups is not None:
            optimizer.param_groups = groups
        # Updates read gradients several times. Where a fused kernel unscales them, it writes them.
        writes = getattr(optimizer, "grad_scale", None) is not None or not self.rules.in_buckets
        try:
            with fetched_gradients([] if writes else parameters):
                found = inner()
        except BaseException as error:
            counts.put_back()
            # Whether they have been changed cannot be seen: foreach kernels count no versions.
            note(
                error,
                f"It came from within the update of {len(parameters)} parameters, which may have "
                "been changed in part; their state is that before the step.",
            )
            raise
        finally:
            optimizer.state = state
            if groups is not None:
                optimizer.param_groups = all_groups
        for parameter in parameters:
            self._progress.remember(parameter, parameter.numel())
        self._put_away(state, keys, local, arrived)
        return found

    def _put_away(
        self,
        state: States,
        keys: list[Any],
        local: dict[Any, Any],
        arrived: list[Transit],
    ) -> None:
        """Send the state off the device again, and have the dictionaries say so."""
        leaving = Leaving(state, keys, local, arrived, check=not self.rules.in_buckets)
        for key in keys:
            if key not in local and key in state:
                del state[key]
        leaving.enter(state)
        transits = {transit.device: transit for transit in arrived}
        failure: Exception | None = None
        for device in leaving.pairs.keys() | transits.keys():
            if device.type != "cuda":
                continue
            transit = transits.get(device) or Transit(device, 0)
            try:
                self._transfers.send(transit, leaving.pairs.get(device, []))
            except Exception as error:
                failure = error
        if leaving.staying and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: some of its state shares memory with other tensors and stays on the device",
                self.rules.base.__name__,
            )
        if leaving.refused:
            raise ConfigError(
                f"{self.rules.base.__name__} has made state of {leaving.refused}, which cannot be "
                "moved by its bytes. The step is done; go on after spillover.optim.unpage()"
            )
        if failure is not None:
            try:
                raise failure
            finally:
                del failure, leaving


class Leaving:
    """What lies in the dictionaries after an update, and the tensors that are to be copied out."""

    def __init__(
        self,
        state: States,
        keys: list[Any],
        local: dict[Any, Any],
        arrived: list[Transit],
        *,
        check: bool,
    ) -> None:
        self.pairs: dict[torch.device, list[Pair]] = {}
        self.refused = ""
        self.staying = False
        known = {id(each): each for each in _parked(state, keys)}
        #: Where each tensor goes, by its identity: shared ones are copied once.
        self._places: dict[int, Parked] = {}
        for transit in arrived:
            for identity, tensor in transit.tensors.items():
                self._places[id(tensor)] = known[identity]
        self._paired: set[int] = set()
        self._storages = _storages(local) if check else {}
        self._raw = {key: self._raw_of(state, key, value) for key, value in local.items()}

    def enter(self, state: States) -> None:
        """Have it lie there."""
        for key, raw in self._raw.items():
            if not isinstance(raw, dict):
                dict.__setitem__(state, key, raw)
            elif raw or key in state:
                state[key].set_raw(raw)

    def _raw_of(self, state: States, key: Any, value: Any) -> Any:
        entry = state.get(key)
        old = entry.raw() if isinstance(entry, Entry) else {}
        place = functools.partial(self._place, key)
        if not isinstance(value, dict):
            return map_leaves(value, functools.partial(place, None))
        return {
            name: map_leaves(each, functools.partial(place, old.get(name)))
            for name, each in value.items()
        }

    def _place(self, key: Any, old: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_cuda:
            return leaf
        if not is_movable(leaf):
            self.refused = self.refused or str(type(leaf))
            return leaf
        if not is_large(leaf):
            return leaf
        if self._storages.get(leaf.untyped_storage().data_ptr(), 1) > 1:
            self.staying = True
            return leaf
        place = self._places.get(id(leaf))
        if place is None:
            place = self._places[id(leaf)] = self._new_place(key, leaf, old)
        if id(place) not in self._paired:
            self._paired.add(id(place))
            self.pairs.setdefault(leaf.device, []).append((leaf, place))
        return place

    def _new_place(self, key: Any, leaf: torch.Tensor, old: Any) -> Parked:
        follows = isinstance(key, torch.Tensor) and key.device == leaf.device
        place = Parked(leaf, device=None if follows else leaf.device)
        # The optimizer may have put a new tensor in the place of one that is like it.
        if isinstance(old, Parked) and id(old) not in self._paired and old.is_like(place):
            return old
        return place


class _Counts:
    """The small tensors of some state, to be put back after a failure."""

    def __init__(self, local: dict[Any, Any]) -> None:
        self._kinds: dict[Any, list[torch.Tensor]] = {}
        for value in local.values():
            for leaf in leaves(value):
                if isinstance(leaf, torch.Tensor) and is_movable(leaf) and not is_large(leaf):
                    kind = (leaf.device, leaf.dtype, leaf.shape)
                    self._kinds.setdefault(kind, []).append(leaf)
        # One kernel for all of a kind.
        with torch.no_grad():
            self._saved = [torch.stack(tensors) for tensors in self._kinds.values()]

    def put_back(self) -> None:
        """Have them as they were."""
        with torch.no_grad():
            for tensors, saved in zip(self._kinds.values(), self._saved, strict=True):
                for tensor, value in zip(tensors, saved.unbind(), strict=True):
                    tensor.copy_(value)


def _parked(state: States, keys: list[Any]) -> Iterator[Parked]:
    for key in keys:
        entry = state.get(key)
        for leaf in leaves(entry.raw() if isinstance(entry, Entry) else entry):
            if isinstance(leaf, Parked):
                yield leaf


def _device_of(parked: Parked, key: Any) -> torch.device:
    if parked.device is not None:
        return parked.device
    device: torch.device = key.device
    return device


def _on_device(
    state: States, keys: list[Any], here: dict[int, torch.Tensor]
) -> defaultdict[Any, Any]:
    """Plain state for the optimizer, with the tensors that have come."""

    def found(leaf: Any) -> Any:
        return here[id(leaf)] if isinstance(leaf, Parked) else leaf

    local: defaultdict[Any, Any] = defaultdict(dict)
    for key in keys:
        entry = state.get(key)
        if entry is not None:
            local[key] = map_leaves(entry.raw() if isinstance(entry, Entry) else entry, found)
    return local


def _groups_of(
    optimizer: torch.optim.Optimizer,
    bucket: Bucket,
    decisions: list[Callable[[torch.Tensor], Group]],
) -> list[Group]:
    """The optimizer's groups with the parameters of a bucket; see Note [Parameters apart]."""
    members = {id(parameter) for parameter in bucket.parameters}
    found: list[Group] = []
    for group, decide in zip(optimizer.param_groups, decisions, strict=True):
        apart: dict[str, Group] = {}
        for parameter in group["params"]:
            if id(parameter) in members:
                fixed = decide(parameter)
                part = apart.setdefault(repr(fixed), {**group, **fixed, "params": []})
                part["params"].append(parameter)
        found.extend(apart.values())
    return found


def _is_separable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether no parameter is there twice, and no two share state."""
    seen: set[int] = set()
    state: States = optimizer.state  # type: ignore[assignment]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ids = {id(parameter), *(id(parked) for parked in _parked(state, [parameter]))}
            if not seen.isdisjoint(ids):
                return False
            seen |= ids
    return True


def _storages(local: dict[Any, Any]) -> dict[int, int]:
    """How often the state, and its parameters and gradients, use each storage on a device."""
    found: dict[int, int] = defaultdict(int)
    tensors: dict[int, torch.Tensor] = {}
    for key, value in local.items():
        for leaf in leaves(value):
            if _is_on_device(leaf):
                tensors[id(leaf)] = leaf
        for each in (key, key.grad) if isinstance(key, torch.Tensor) else ():
            if each is not None and _is_on_device(each):
                found[each.untyped_storage().data_ptr()] += 1
    for tensor in tensors.values():
        found[tensor.untyped_storage().data_ptr()] += 1
    return found


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda and is_movable(value)


def _explain(error: BaseException, done: int, total: int | None) -> None:
    if done and done == total:
        note(error, "The step is done: all parameters have been updated, with their state.")
    elif done:
        note(
            error,
            f"{done} of {total} parameters had been updated by this step, with their state, before "
            "it failed. Calling step() again with the same gradients updates the others.",
        )
    else:
        note(error, "No parameter's state has been changed; step() may be called again.")
