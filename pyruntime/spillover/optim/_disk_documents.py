"""What a commit says of the optimizer that made it, and whether another one is that optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spillover._errors import ConfigError
from spillover.optim._algorithms import Group
from spillover.optim._disk_layout import Layout

FORMAT = 2


def parameters_of(groups: list[Group]) -> list[torch.Tensor]:
    """All of them, in their order."""
    return [each for group in groups for each in group["params"]]


def numbered(layout: Layout, groups: list[Group]) -> list[list[int]]:
    """The layout's batches, by the parameters' numbers."""
    numbers = {parameter: number for number, parameter in enumerate(parameters_of(groups))}
    return [[numbers[each] for each in batch] for batch in layout.batches]


def options_of(group: Group) -> dict[str, Any]:
    """Without its parameters."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a commit must have in common with the optimizer that resumes it.

    Attributes
    ----------
    optimizer
        The name of its class.
    signature
        Forms of state, and names, types, shapes and strides of weights and buffers.
    counts
        Of the parameters of each group.
    names
        Of parameters, by groups; none of groups that were made without.
    """

    optimizer: str
    signature: list[Any]
    counts: list[int]
    names: list[str]

    @classmethod
    def of(cls, optimizer: str, groups: list[Group], signature: list[Any]) -> Identity:
        """Of an optimizer with these groups."""
        return cls(
            optimizer=optimizer,
            signature=signature,
            counts=[len(group["params"]) for group in groups],
            names=[name for group in groups for name in group.get("param_names", ())],
        )

    def document(self) -> dict[str, Any]:
        """As a part of a commit's."""
        return {"format": FORMAT, **vars(self)}

    def check_kind(self, document: dict[str, Any], where: str) -> None:
        """Raise ConfigError where a commit is of another class, or version."""
        if document["format"] != FORMAT:
            raise ConfigError(f"the commit in {where} is of another version of Spillover")
        if document["optimizer"] != self.optimizer:
            raise ConfigError(
                f"the commit in {where} is of {document['optimizer']}, not of {self.optimizer}"
            )

    def check(self, document: dict[str, Any], where: str) -> None:
        """Raise ConfigError where a commit is not of this optimizer."""
        self.check_kind(document, where)
        count, saved_count = sum(self.counts), sum(document["counts"])
        if count != saved_count:
            raise ConfigError(
                f"the commit in {where} is of {saved_count} parameters, and the optimizer has "
                f"{count}: call add_param_group() before resume() for those that the commit has, "
                "and after it for those that it does not have"
            )
        mine, saved = self.signature, document["signature"]
        if mine != saved:
            pairs = (pair for pair in zip(mine, saved, strict=False) if pair[0] != pair[1])
            here, there = next(pairs, (len(mine), len(saved)))
            raise ConfigError(
                f"the commit in {where} is of other parameters: it has {there} where the "
                f"optimizer has {here}"
            )
        if self.counts != document["counts"]:
            raise ConfigError(
                f"the commit in {where} has groups of {document['counts']} parameters, and the "
                f"optimizer of {self.counts}"
            )
        # Wrappers give all other names, but none in another order.
        saved_names = document["names"]
        if self.names != saved_names and set(self.names) == set(saved_names):
            here, there = next(
                each for each in zip(self.names, saved_names, strict=True) if len({*each}) > 1
            )
            raise ConfigError(
                f"the commit in {where} has the parameters in another order: it has {there!r} "
                f"where the optimizer has {here!r}"
            )
