"""Tags: what belongs together is counted, and lies, together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spillover import _core
from spillover._errors import ConfigError
from spillover.allocator import _pool

if TYPE_CHECKING:
    from spillover._core import TagStats


@contextmanager
def tag(name: str) -> Iterator[None]:
    """Tag what this thread allocates within the ``with`` block.

    Blocks of one tag share no 2 MiB page with those of another. Works for tensors, with the
    allocator installed, and for :class:`Pool`; on every device. Does not block. Tags nest; the
    innermost counts, and ``""`` is the tag of whoever sets none. Threads have tags of their own:
    a thread that is started within the block has none, and neither has autograd's backward. The
    block must not contain a ``yield`` or an ``await``: what runs meanwhile would have its tag.

    Parameters
    ----------
    name
        At most 256 bytes in UTF-8. There may be 4095 names in a process.

    Raises
    ------
    ConfigError
        The name is no text or too long, or there are too many.
    """
    previous = _core.set_tag(_core.tag_number(checked_name(name)))
    try:
        yield
    finally:
        _core.set_tag(previous)


def tag_stats(name: str, device: int = 0) -> TagStats:
    """What blocks of one tag have on one device.

    Parameters
    ----------
    name
        The tag; of one that was never used every figure is 0.
    device
        Index of the CUDA device.

    Returns
    -------
    dict
        ``allocation`` (live blocks), ``allocated_bytes`` (theirs, rounded to 512), and
        ``reserved_bytes`` and ``reserved_bytes_peak`` of the memory that is mapped for the tag;
        ``asleep_bytes`` of device memory that sleeps and ``saved_bytes`` of contents that are kept
        on the host meanwhile, private pools under the tag included.

    Raises
    ------
    ConfigError
        The name is no text, or there is no such device.
    """
    number = _core.find_tag(checked_name(name))
    pool = _core.Pool(_pool.device_index(device))
    if number is None:
        return {
            "allocation": 0,
            "allocated_bytes": 0,
            "reserved_bytes": 0,
            "reserved_bytes_peak": 0,
            "asleep_bytes": 0,
            "saved_bytes": 0,
        }
    return pool.tag_stats(number)


def checked_name(name: str) -> str:
    """The name, where it can be that of a tag."""
    try:
        if isinstance(name, str):
            name.encode()
            return name
    except UnicodeEncodeError:
        pass  # half of a surrogate pair, which no text in UTF-8 has
    raise ConfigError(f"a tag is a text that can be written in UTF-8, not {name!r}")
