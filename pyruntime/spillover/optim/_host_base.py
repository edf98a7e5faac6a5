"""What optimizers on the host have and show: their state in memory, their groups, figures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spillover._core import HostPool
from spillover._errors import ConfigError
from spillover._settings import enabled
from spillover._sources import register
from spillover.optim._algorithms import Algorithm, Group
from spillover.optim._disk_entries import DiskEntries
from spillover.optim._disk_tier import DiskTier
from spillover.optim._gradients import Anomalies, OffloadedGradients, offload_gradients
from spillover.optim._host_entries import Entries
from spillover.optim._host_state import StateOptions
from spillover.optim._host_step import Unsent
from spillover.optim._host_work import check_parameter
from spillover.optim._overlap import Overlap
from spillover.optim._progress import Progress
from spillover.optim._state_dictionaries import HostEntry
from spillover.optim._tiers import Tier, TierOptions, check_device_tier, tier_options

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


class HostBase(torch.optim.Optimizer):
    """Without checkpoints and steps."""

    algorithm: ClassVar[Algorithm]
    #: Torch's class, which is made instead where Spillover is switched off.
    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None

    #: Whether what it was made with has its memory, so that what comes later gets it by itself.
    _is_made: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give torch's own optimizer when Spillover is switched off."""
        made = cls.__dict__.get("torch_class")
        if made is not None and not enabled():
            return made(*args, **{k: v for k, v in kwargs.items() if k not in _OWN_OPTIONS})
        return super().__new__(cls)

    def _begin(
        self, options: StateOptions, pool: HostPool | None, tier: TierOptions | None = None
    ) -> None:
        name = type(self).__name__
        self._entries = Entries(self.algorithm, options, pool, name)
        self._disk: DiskTier | None = None
        if tier is not None and tier.tier != "host":
            synchronize = weakref.WeakMethod(self.synchronize)
            self._entries = DiskEntries(self.algorithm, options, pool, name, synchronize)
            self._disk = DiskTier(tier, self._entries, name, weakref.ref(self))
        self._progress = Progress()
        self._unsent = Unsent()
        register("optimizer", self, HostBase.stats)

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

    def _offload_gradients(self, anomalies: Anomalies | None) -> None:
        self._gradients = offload_gradients(
            named_parameters(self.param_groups), anomalies=anomalies
        )

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
        HostOutOfMemory, DiskFull, StorageError
            There is no room for their state or gradients. Nothing is added.

        Notes
        -----
        Where state is on disk, blocks until all of it is copied to a larger store: one call with
        several parameters takes the time of one with a single one.
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
                if self._disk is not None:
                    self._disk.cover(self.param_groups)
            if self.gradients is not None:
                self.gradients.add(named_parameters(self.param_groups))
        except BaseException:
            for parameter in self.param_groups.pop()["params"]:
                self._raw_state.pop(parameter, None)
            self._entries.memory.forget_all_but(
                each for group in self.param_groups for each in group["params"]
            )
            if self._disk is not None and self._is_made:
                self._disk.forget_all_but(self.param_groups)
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
                entry = self.state[parameter] = entry_of(self.state, parameter)
                self._entries.complete_moments(parameter, group, entry)
                # So that a checkpoint that is loaded into the state has its masters, too.
                self._entries.complete_master(parameter, group, entry)

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


def named_parameters(groups: list[Group]) -> list[tuple[str, torch.Tensor]]:
    """All parameters, by their names where the optimizer was given them."""
    return [
        (group["param_names"][index] if "param_names" in group else f"{number}.{index}", parameter)
        for number, group in enumerate(groups)
        for index, parameter in enumerate(group["params"])
    ]


def entry_of(state: Mapping[torch.Tensor, Any], parameter: torch.Tensor) -> HostEntry:
    """The state of a parameter, empty where there is none."""
    found = state.get(parameter, {})
    return found if isinstance(found, HostEntry) else HostEntry(found)
