"""What a step that failed says about how far it came."""

from __future__ import annotations


def note(error: BaseException, text: str) -> None:
    """Add ``text`` to what is printed of ``error``, on Python 3.10 as well."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), text]  # type: ignore[attr-defined]
