"""State dictionaries, copies and pickles of optimizers on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spillover._errors import ConfigError, StateError
from spillover.optim._algorithms import Group
from spillover.optim._host_base import HostBase
from spillover.optim._host_state import StateOptions


@dataclass(frozen=True, eq=False)
class _Kept:
    """Hides a state tensor from torch's load_state_dict, which would cast it like the weight."""

    tensor: torch.Tensor


class HostCheckpoints(HostBase):
    """Loads what torch's classes save, and saves what they load."""

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


def _shown(value: Any) -> Any:
    return value.tensor if isinstance(value, _Kept) else value
