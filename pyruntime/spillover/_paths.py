"""Where the package's compiled libraries and sources lie.

A wheel puts them beside the Python files; an editable install keeps them in site-packages while the
Python files stay in the checkout, so every folder of the package's path is searched.
"""

from __future__ import annotations

from pathlib import Path

import spillover
from spillover._errors import StateError


def package_folder(name: str) -> Path:
    """Folder ``name`` of the installed package.

    Raises
    ------
    StateError
        The installation lacks it; the message says how to repair that.
    """
    for root in spillover.__path__:
        folder = Path(root) / name
        if folder.is_dir():
            return folder
    raise StateError(
        f"this installation of spillover has no folder {name!r} "
        f"(searched {', '.join(map(str, spillover.__path__))}); reinstall it with 'pip install .'"
    )


def library_path(file_name: str) -> Path:
    """Path of a compiled library such as ``libspillover.so``."""
    return package_folder("_lib") / file_name


def source_path(*parts: str) -> Path:
    """Path of a C++ source or header that is compiled against the installed torch."""
    return package_folder("_csrc").joinpath(*parts)
