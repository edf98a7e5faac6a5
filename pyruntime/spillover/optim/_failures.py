"""What a step that failed says about how far it came, and what no step can do."""

from __future__ import annotations

import torch

from spillover._errors import StateError


def check_capture(what: str, reason: str) -> None:
    """Raise StateError where the current stream records a CUDA graph."""
    # What has no driver records nothing.
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if is_initialized and torch.cuda.is_current_stream_capturing():
        raise StateError(
            f"{what} cannot be recorded in a CUDA graph: {reason}; call it outside of the capture"
        )


def note(error: BaseException, text: str) -> None:
    """Add ``text`` to what is printed of ``error``, on Python 3.10 as well."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), text]  # type: ignore[attr-defined]
