"""Which tier an optimizer's state is in, and what the user said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from spillover._disk import Folder, absolute_folders
from spillover._errors import ConfigError
from spillover._units import parse_bytes

Tier = Literal["host", "disk", "auto"]

#: Steps between two commits, unless told otherwise.
_COMMIT_EVERY = 10


@dataclass(frozen=True)
class TierOptions:
    """Where state lives; see :class:`spillover.optim.AdamW`."""

    tier: Tier = "host"
    folders: tuple[str, ...] = ()
    host_budget: int | None = None
    commit_every: int | None = None
    module: nn.Module | None = None
    write_limit: int | None = None


def tier_options(
    tier: Tier,
    directory: Folder | Sequence[Folder] | None,
    host_budget: int | str | None,
    commit_every: int | Literal["auto"] | None,
    module: nn.Module | None,
    write_limit: int | str | None,
) -> TierOptions:
    """Check what a user gave. Raises ConfigError."""
    if tier not in ("host", "disk", "auto"):
        raise ConfigError(f"tier={tier!r} is not known; it must be 'host', 'disk' or 'auto'")
    if tier == "host":
        for name, value, nothing in (
            ("directory", directory, None),
            ("host_budget", host_budget, None),
            ("commit_every", commit_every, "auto"),
            ("module", module, None),
            ("write_limit", write_limit, None),
        ):
            if value != nothing:
                raise ConfigError(f"{name} is for tier='disk' and tier='auto'")
        return TierOptions()
    if directory is None:
        raise ConfigError(f"tier={tier!r} needs directory, a folder or several on fast disks")
    if tier == "disk" and host_budget is not None:
        raise ConfigError("host_budget is for tier='auto'; a disk tier keeps no state on the host")
    every = _COMMIT_EVERY if commit_every == "auto" else commit_every
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ConfigError(
            f"commit_every={commit_every!r} must be a number of steps from 1, or None for commits "
            "by optimizer.commit() alone"
        )
    if module is not None and not isinstance(module, nn.Module):
        raise ConfigError(f"module must be a torch.nn.Module, got a {type(module).__name__}")
    return TierOptions(
        tier=tier,
        folders=tuple(absolute_folders(directory)),
        host_budget=None if host_budget is None else parse_bytes(host_budget, name="host_budget"),
        commit_every=every,
        module=module,
        write_limit=None if write_limit is None else parse_bytes(write_limit, name="write_limit"),
    )


def check_device_tier(tier: object, torch_class: type[torch.optim.Optimizer] | None) -> None:
    """Raise ConfigError that names torch's class where somebody asks for state on the device."""
    if tier == "device" and torch_class is not None:
        name = f"torch.optim.{torch_class.__name__}"
        raise ConfigError(
            f"tier='device' is what {name} does; here tier is 'host', 'disk' or 'auto'"
        )
