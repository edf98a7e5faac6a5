"""What all pictures have in common: matplotlib, which is optional, and the file they go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spillover._errors import ConfigError


def figure_class() -> Any:
    """Matplotlib's ``Figure``.

    Raises
    ------
    ConfigError
        matplotlib is missing.
    """
    try:
        # Without pyplot, which would choose a window system.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "pictures need matplotlib; install it with 'pip install spillover[plots]'"
        ) from error
    return Figure


def require_picture(path: Path | str) -> None:
    """Refuse a picture that :func:`save` could not write, before hours of work end at it.

    Raises
    ------
    ConfigError
        matplotlib is missing, or does not know the format that the suffix names.
    """
    formats = figure_class()().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix and suffix not in formats:
        raise ConfigError(
            f"the picture {str(path)!r} cannot be written: the format {suffix!r} is not one of "
            f"{', '.join(sorted(formats))}"
        )


def save(figure: Any, path: Path | str) -> None:
    """Write the picture; its suffix chooses the format.

    Raises
    ------
    ConfigError
        matplotlib does not know the format, or there is no such folder.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {str(path)!r} cannot be written: {error}") from error
