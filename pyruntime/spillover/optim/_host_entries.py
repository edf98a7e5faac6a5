"""The state of each parameter of an optimizer on the host: made, kept up to date, put in order.

Note [What the host holds]
--------------------------
For each parameter: its moments, and for bf16 and fp16 weights an fp32 master. A float32 weight on
the device has no master: it comes to the host with its gradient and goes back changed, which costs
link traffic and saves four bytes a parameter. A weight on the host (streamed blocks) is updated
where it lies.

A master can fall behind the weight when something else writes the weight: a checkpoint loaded
after the optimizer was made, a re-initialised layer. The weight's version counter after our own
write is remembered; when it differs at the next step, the weight is compared with the rounded
master, element by element, and the master takes over those that differ. So a resumed run keeps the
low bits of its masters whichever of the two checkpoints was loaded first. A write through
``weight.data`` does not move the counter and is not seen.

With ``master="split"`` the weight is the upper half of its master, so a weight that something else
writes is its master at once, but for the old remainder: at most half a unit in the weight's last
place. Where the weight became 0, infinite or NaN, the remainder is dropped. Checkpoints have whole
masters either way, and one that is loaded is split at the next step, when the weights are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from spillover._core import HostPool
from spillover._errors import ConfigError
from spillover.optim._algorithms import Algorithm, Group
from spillover.optim._host_state import (
    MASTER,
    REMAINDER,
    BlockwiseState,
    StateMemory,
    StateOptions,
    Wanted,
    assign,
    fill,
    is_like,
    wanted_arrays,
)
from spillover.optim._masters import drop_odd_remainders, refresh_master, split_master, whole_master
from spillover.optim._state_dictionaries import HostEntry
from spillover.optim._state_store import HostStore, StateStore

#: What torch's ``optimizer.state`` has for a parameter.
Entry = dict[str, Any]


class Entries:
    """Makes and reads the entries of ``optimizer.state``; Note [What the host holds].

    Not thread-safe, as optimizers are not.
    """

    def __init__(
        self, algorithm: Algorithm, options: StateOptions, pool: HostPool | None, name: str
    ) -> None:
        self.algorithm = algorithm
        self.options = options
        self.memory = StateMemory(pool)
        self.store: StateStore = HostStore()
        # The rounding of bfloat16 moments is random by step.
        self.counts_steps = algorithm.counts_steps or options.moments == "bfloat16"
        self._name = name
        # Version counters and addresses of weights after our last write.
        self._versions: dict[torch.Tensor, tuple[int, int]] = {}

    def wanted(self, parameter: torch.Tensor, group: Group) -> dict[str, Wanted]:
        """The arrays of a parameter's state."""
        return wanted_arrays(self.algorithm, self.options, parameter, group)

    def reserve(self, parameters: Iterable[tuple[torch.Tensor, Group]]) -> None:
        """Have memory for the state of parameters. Raises HostOutOfMemory, with nothing changed."""
        self.memory.reserve(
            [(parameter, self.wanted(parameter, group)) for parameter, group in parameters],
            self._name,
        )

    # ---- for a step ----------------------------------------------------------------------------

    def complete_moments(self, parameter: torch.Tensor, group: Group, entry: Entry) -> Entry:
        """Have ``entry`` hold a step count and moments; returns those that come into it later.

        Memory must be reserved, here and below.
        """
        if self.counts_steps and "step" not in entry:
            entry["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        late: Entry = {}
        wanted = self.wanted(parameter, group)
        for spec in self.algorithm.moments(group):
            value = entry.get(spec.name)
            if value is not None and is_like(value, wanted[spec.name], parameter):
                continue
            array = self.memory.get(parameter, spec.name)
            if value is not None:
                assign(array, value.to_float32() if isinstance(value, BlockwiseState) else value)
            elif not self.algorithm.first_step_reads:
                late[spec.name] = array
                continue
            else:
                fill(array, self.algorithm.initial_value(group))
            entry[spec.name] = array
        return late

    def complete_master(self, parameter: torch.Tensor, group: Group, entry: Entry) -> None:
        """Have ``entry`` hold what the weight is rounded from, and have that be up to date."""
        wanted = self.wanted(parameter, group)
        master, remainder = entry.get(MASTER), entry.get(REMAINDER)
        if REMAINDER in wanted:
            array = self.memory.tensor(parameter, REMAINDER)
            if master is not None:
                split_master(parameter, master, array)
            elif remainder is None:
                array.zero_()
            else:
                if remainder is not array:
                    array.copy_(remainder)
                self._drop_odd_remainders(parameter, array)
            entry[REMAINDER] = array
        elif MASTER in wanted:
            array = self.memory.tensor(parameter, MASTER)
            if master is not None:
                if master is not array:
                    array.copy_(master)
                if not self.was_ours(parameter):
                    refresh_master(parameter, array)
            elif remainder is not None and parameter.dtype == torch.bfloat16:
                array.copy_(whole_master(parameter, remainder))
            else:
                array.copy_(parameter)
            entry[MASTER] = array
        for name in (MASTER, REMAINDER):
            if name not in wanted:
                entry.pop(name, None)

    def needs_weight(self, parameter: torch.Tensor) -> bool:
        """Whether a step needs the weight's values beside its master."""
        return False

    def loaded_master(self, parameter: torch.Tensor, entry: Entry) -> torch.Tensor | None:
        """A whole master, flat, that a step has to split part by part."""
        return None

    def number(self, entry: Entry, late: Entry) -> int:
        """Of the step to come, from 1."""
        if late:
            return 1
        first = 1 if self.algorithm.first_step_reads else 2
        return max(int(entry["step"]) + 1, first) if self.counts_steps else first

    def has_written(self, parameter: torch.Tensor) -> None:
        """Note that the weight is as the optimizer wrote it."""
        self._versions[parameter] = _identity(parameter)

    def was_ours(self, parameter: torch.Tensor) -> bool:
        """Whether the weight is as the optimizer wrote it."""
        return self._versions.get(parameter) == _identity(parameter)

    def _drop_odd_remainders(self, parameter: torch.Tensor, remainder: torch.Tensor) -> None:
        if not self.was_ours(parameter):
            drop_odd_remainders(parameter, remainder)

    # ---- for checkpoints -----------------------------------------------------------------------

    def unpacked(self, parameter: torch.Tensor, entry: Entry) -> Entry:
        """As torch has it: tensors of the parameter's shape. What is in other forms is copied."""
        found = {
            name: value.to_float32() if isinstance(value, BlockwiseState) else value
            for name, value in entry.items()
        }
        remainder = found.pop(REMAINDER, None)
        if remainder is not None and MASTER not in found:
            self._drop_odd_remainders(parameter, remainder)
            found[MASTER] = whole_master(parameter, remainder)
        return found

    def take_over(self, loaded: Sequence[tuple[torch.Tensor, Group, Entry]]) -> list[Entry]:
        """Entries in our forms and memory, with the values of those that were loaded.

        Raises
        ------
        ConfigError
            They do not fit the parameters, or share memory with the state of others.
        HostOutOfMemory
            There is no memory. Nothing has been changed in either case.
        """
        self._check_shapes(loaded)
        self.reserve(
            (parameter, group)
            for parameter, group, entry in loaded
            if parameter.numel() > 0 and (parameter.requires_grad or entry)
        )
        self._check_shared(loaded)
        found = [
            self._placed(parameter, self.wanted(parameter, group), entry)
            for parameter, group, entry in loaded
        ]
        self._versions.clear()
        return found

    def _check_shapes(self, loaded: Sequence[tuple[torch.Tensor, Group, Entry]]) -> None:
        for parameter, group, entry in loaded:
            for name in (*self.wanted(parameter, group), MASTER):
                value = entry.get(name)
                if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                    raise ConfigError(
                        f"the state {name!r} of a parameter of shape {tuple(parameter.shape)} has "
                        f"shape {tuple(value.shape)} in what is loaded; nothing was loaded"
                    )

    def _check_shared(self, loaded: Sequence[tuple[torch.Tensor, Group, Entry]]) -> None:
        """Raise where writing one state would change another that is still to be read."""
        own = {_address(array): array for array in self.memory.all_arrays()}
        for parameter, group, entry in loaded:
            for name in self.wanted(parameter, group) if parameter.numel() > 0 else ():
                value = entry.get(name)
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    target = self.memory.get(parameter, name)
                    if own.get(value.data_ptr(), target) is not target:
                        raise ConfigError(
                            "what is loaded shares memory with the state of another parameter "
                            "here; load a copy.deepcopy of it. Nothing was loaded"
                        )

    def _placed(self, parameter: torch.Tensor, wanted: dict[str, Wanted], entry: Entry) -> Entry:
        found = HostEntry()
        for name, value in entry.items():
            if name == "step":
                step = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach()
                found[name] = step.clone().reshape(())
            elif name == MASTER and name not in wanted:
                # To be split at the next step; a float32 weight has none.
                if parameter.dtype != torch.float32 and value is not None:
                    found[name] = value.detach().clone()
            elif name in wanted and isinstance(value, torch.Tensor | BlockwiseState):
                array = self.memory.get(parameter, name) if parameter.numel() > 0 else value
                if parameter.numel() > 0:
                    values = value.to_float32() if isinstance(value, BlockwiseState) else value
                    assign(array, values)
                found[name] = array
            elif value is not None:
                found[name] = value
        return found


def _identity(parameter: torch.Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def _address(array: Any) -> int:
    tensor = array.moment.codes if isinstance(array, BlockwiseState) else array
    return int(tensor.data_ptr())
