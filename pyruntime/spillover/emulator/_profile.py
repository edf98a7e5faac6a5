"""The numbers of a card as the flat text that the emulated device reads."""

from __future__ import annotations

from spillover._errors import ConfigError

#: One ``section.key=value`` a line.
VALUES_VARIABLE = "SPILLOVER_EMULATOR_PROFILE_VALUES"


def values(name: str) -> str:
    """The numbers of a profile.

    Raises
    ------
    ConfigError
        There is no profile of that name.
    """
    raise ConfigError(f"profile={name!r} is not known")
