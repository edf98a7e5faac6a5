"""Where torch initialised CUDA, for the error of an allocator that is installed too late."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

_place: str | None = None


def watch() -> None:
    """Note the place once torch initialises CUDA; torch must be imported."""
    import torch

    cuda: Any = torch.cuda  # torch leaves some of its functions without types
    if not cuda.is_initialized():
        cuda._lazy_call(_note)


def torch_has_cuda() -> bool:
    """Whether the imported torch was built for CUDA."""
    import torch

    return torch.version.cuda is not None


def place() -> str | None:
    """File and line of the program that initialised CUDA; None where nobody watched."""
    return _place


def _note() -> None:
    global _place
    import torch

    library = str(Path(torch.__file__).parent)
    own = str(Path(__file__).parent)
    # The innermost frame that is the program's: those within it are torch's and this module's.
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((library, own)):
            _place = f"{frame.filename}:{frame.lineno}: {frame.line or frame.name}"
            return
