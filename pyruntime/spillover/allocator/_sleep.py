"""Sleep and wake: memory of tags goes to the driver and comes back at the same addresses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from spillover import _core, _pinned
from spillover._errors import ConfigError, SpilloverError, StateError
from spillover.allocator import _pool, _tags

Contents = Literal["host", "discard"]


def sleep(
    tags: str | Iterable[str] | None = None,
    *,
    contents: Contents = "host",
    device: int | None = None,
) -> int:
    """Give the device memory of tags to the driver; :func:`wake` brings it back where it was.

    Tensors, pointers and CUDA graphs stay valid and are usable again after :func:`wake`. Until then
    a use of the memory faults, and an allocation with the tag raises; freeing is as ever, and what
    was freed neither comes back nor keeps its copy. The memory of private pools (CUDA graphs,
    ``MemPool``) sleeps with the tag under which the pool was first used; that of a ``MemPool`` with
    an allocator of its own never does.

    Blocks, without the GIL, until the devices and their peers have done everything that was
    submitted, on all streams, and until the copies are done. No thread may use or submit work on
    memory of the tags from the call on; other memory may be used and allocated meanwhile. Of tags
    that sleep already nothing happens. Either all tags sleep afterwards on all devices or, with an
    error, none: their memory and its contents are where they were.

    Parameters
    ----------
    tags
        A name or several (see :func:`tag`); ``""`` is what has no tag. By default every name.
    contents
        ``"host"`` copies live blocks to pinned host memory, which comes from the process's pool
        (``SPILLOVER_HOST_LIMIT``) and goes back there when the tag wakes. ``"discard"`` copies
        nothing; what is in the memory after waking is not defined.
    device
        Index of a CUDA device; by default all that memory was allocated on.

    Returns
    -------
    int
        Bytes that were copied.

    Raises
    ------
    ConfigError
        Nobody has used a tag of that name, it is no text, or the pool is without virtual memory.
    HostOutOfMemory
        Pinned host memory does not suffice.
    StateError
        A CUDA graph is being recorded, a block is shared with another process, or another thread
        puts a tag to sleep or wakes it.
    DriverError
        A call of the driver failed.
    """
    if contents not in ("host", "discard"):
        raise ConfigError(f"contents={contents!r} is not one of 'host' and 'discard'")
    numbers = _numbers(tags)
    host = _pinned.host_pool() if contents == "host" else None
    copied_bytes = 0
    done: list[tuple[_core.Pool, list[int]]] = []
    for pool in _pools(device):
        fresh = [number for number in numbers if number not in pool.sleeping_tags()]
        try:
            copied_bytes += pool.sleep(fresh, host)
        except BaseException as error:
            if failures := _undo(done):
                raise StateError(f"{error}; what slept by then sleeps on: {failures}") from error
            raise
        done.append((pool, fresh))
    return copied_bytes


def wake(tags: str | Iterable[str] | None = None, *, device: int | None = None) -> int:
    """Bring the memory of tags that sleep back at its addresses, with its contents.

    Blocks, without the GIL, until everything is in place for use on any stream. Memory comes from
    where a request gets it: idle memory of others, the driver, at last the reclaimers. Of tags that
    are awake nothing happens. On each device either all tags are awake afterwards or, with an
    error, all of them are asleep still and intact, so that the call can be repeated.

    Parameters
    ----------
    tags
        A name or several; by default everything that sleeps.
    device
        Index of a CUDA device; by default all of them.

    Returns
    -------
    int
        Bytes that were copied.

    Raises
    ------
    DeviceOutOfMemory
        The device has not enough; the message says how much is missing (``DriverError`` where torch
        is not loaded).
    ConfigError
        Nobody has used a tag of that name, or it is no text.
    StateError
        A CUDA graph is being recorded, or another thread puts a tag to sleep or wakes it.
    DriverError
        A call of the driver failed.
    """
    wanted = None if tags is None else _numbers(tags)
    return sum(
        pool.wake(pool.sleeping_tags() if wanted is None else wanted) for pool in _pools(device)
    )


def _undo(done: list[tuple[_core.Pool, list[int]]]) -> str:
    """Wake what was put to sleep; what could not be woken, and why."""
    failures = []
    for pool, numbers in reversed(done):
        try:
            pool.wake(numbers)
        except (SpilloverError, RuntimeError) as failure:  # also torch's error of memory
            failures.append(f"device {pool.device}: {failure}")
    return "; ".join(failures)


def _numbers(tags: str | Iterable[str] | None) -> list[int]:
    if tags is None:
        return [_number(name) for name in _core.tag_names()[1:]]
    if isinstance(tags, str):
        return [_number(tags)]
    if not isinstance(tags, Iterable):
        raise ConfigError(f"tags={tags!r} is neither the name of a tag nor several of them")
    return [_number(name) for name in tags]


def _number(name: str) -> int:
    number = _core.find_tag(_tags.checked_name(name))
    if number is None:
        known = ", ".join(repr(other) for other in _core.tag_names()[1:]) or "none"
        raise ConfigError(f"nothing was allocated with the tag {name!r}; tags so far: {known}")
    return number


def _pools(device: int | None) -> list[_core.Pool]:
    devices = _core.devices_with_pool() if device is None else [_pool.device_index(device)]
    return [_core.Pool(index) for index in devices]
