"""State tensors that are off the device between steps, behind the dictionaries that torch knows.

Note [What users see]
---------------------
``optimizer.state[parameter]["exp_avg"]`` is a host tensor between steps. In the dictionary lies a
:class:`Parked`, which is not shown: whoever reads the key gets the tensor, after the copy that
fills it, and a tensor on disk is read into host memory first. What is written into the tensor
is what the next step starts from, so such a tensor stays the truth until then.

torch changes state in place, so a tensor that somebody still holds, from a ``state_dict`` or in a
variable, must show the next step's values as well: it is what that step copies to. Nobody would
tell the holder when the copies are over, so such a step waits for them. What is shown is an alias,
so whether somebody holds it, or a view of it, is told by the number of tensors over its storage.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Protocol

import torch

from spillover._layout import dense_stride
from spillover._stalls import Stall
from spillover.optim._state_dictionaries import on_host

_STATE_READ = Stall("optimizer paging", "state to arrive on the host")


class Stored(Protocol):
    """Bytes on disk."""

    def read(self, parked: Parked) -> torch.Tensor:
        """Bring them to host memory; a tensor of ``parked``'s shape."""

    def drop(self) -> None:
        """Give the space back."""


class Parked:
    """A state tensor off the device: in host memory, on disk, or, between, in both.

    ``host`` is the truth where it is set, else ``stored``. ``ready`` is the event of the last copy
    into or out of ``host``; None when the host has waited for it.
    """

    __slots__ = (
        "__weakref__",
        "_alias",
        "_uses",
        "device",
        "dtype",
        "host",
        "is_for_disk",
        "memory",
        "ready",
        "shape",
        "stored",
        "stride",
    )

    def __init__(
        self, tensor: torch.Tensor, *, device: torch.device | None, dtype: torch.dtype | None = None
    ) -> None:
        self.shape = tuple(tensor.shape)
        self.stride = dense_stride(tensor)
        self.dtype = dtype or tensor.dtype
        # None: wherever its parameter is.
        self.device = device
        self.host: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None
        self.stored: Stored | None = None
        self.ready: torch.cuda.Event | None = None
        self.is_for_disk = False
        # Tensors over the host's storage that are not somebody else's.
        self._uses = 0
        self._alias: weakref.ref[torch.Tensor] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def is_like(self, other: Parked) -> bool:
        """Whether the bytes of the one can lie in the place of the other."""
        return (self.shape, self.stride, self.dtype, self.device) == (
            other.shape,
            other.stride,
            other.dtype,
            other.device,
        )

    def live_in(self, memory: torch.Tensor) -> None:
        """Take ``memory``, flat bytes, for the host's copy; its contents are what they are."""
        self.memory = memory
        flat = memory[: self.size_bytes].view(self.dtype)
        self.host = flat.as_strided(self.shape, self.stride)
        del flat
        self._alias = None
        self._uses = _uses(self.host)

    def settle(self) -> None:
        """Block until no copy works on the host's memory."""
        if self.ready is not None:
            _STATE_READ.wait(self.ready.synchronize)
            self.ready = None

    def tensor(self) -> torch.Tensor:
        """The host tensor; see Note [What users see]. Blocks until it is there."""
        self.settle()
        shown = self._alias() if self._alias is not None else None
        if shown is not None:
            return shown
        if self.host is None:
            assert self.stored is not None
            self.host = self.stored.read(self)
            self._uses = _uses(self.host)
            self.stored.drop()
            self.stored = None
        shown = self.host.detach()
        self._alias = weakref.ref(shown)
        return shown

    def is_held(self) -> bool:
        """Whether somebody else has the host tensor, or a view of it."""
        if self.host is None or self._alias is None:
            return False
        if _uses(self.host) > self._uses:
            return True
        self._alias = None
        return False

    def replaced_by(self, tensor: torch.Tensor) -> Parked:
        """One with the contents of a host tensor that a user has put in this one's place."""
        if self._alias is not None and self._alias() is tensor:
            return self
        parked = Parked(tensor, device=self.device)
        parked.is_for_disk = self.is_for_disk
        # Without our own alias, of which the user's tensor is one more.
        parked._uses = _uses(tensor)
        parked.host = tensor.detach()
        parked._alias = weakref.ref(tensor)
        return parked

    def leave_host(self) -> None:
        """Forget the host's copy; the caller has its bytes elsewhere."""
        self.settle()
        self.host = self.memory = self._alias = None

    def __del__(self) -> None:
        # The memory goes back to its pool now, and may be given out at once.
        with contextlib.suppress(Exception):
            if self.host is not None and self.ready is not None:
                self.ready.synchronize()


def _uses(tensor: torch.Tensor) -> int:
    """References to the storage of ``tensor``."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


class Entry(dict[Any, Any]):
    """The state of one parameter: what ``optimizer.state[parameter]`` gives.

    A dictionary for whoever asks, and each way of reading it goes through ``__getitem__``: C code,
    as ``dict(entry)``, takes that way where ``__iter__`` is not a dictionary's own.
    """

    get = MutableMapping.get  # type: ignore[assignment]
    items = MutableMapping.items  # type: ignore[assignment]
    values = MutableMapping.values  # type: ignore[assignment]
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update
    __eq__ = MutableMapping.__eq__
    __hash__ = None

    def __getitem__(self, key: Any) -> Any:
        return map_leaves(dict.__getitem__(self, key), _shown)

    def __setitem__(self, key: Any, value: Any) -> None:
        old = dict.get(self, key)
        if isinstance(old, Parked) and is_movable(value):
            if value.device.type != "cpu":
                value = on_host(old.tensor(), value)
            value = old.replaced_by(value)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: Any) -> None:
        dict.__delitem__(self, key)

    def __iter__(self) -> Iterator[Any]:
        return dict.__iter__(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[Any, Any]:
        """A plain dictionary with the host tensors."""
        return dict(self)

    def __copy__(self) -> dict[Any, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def raw(self) -> dict[Any, Any]:
        """What lies in it, with :class:`Parked` for what is off the device."""
        return dict(dict.items(self))

    def set_raw(self, raw: dict[Any, Any]) -> None:
        """Have ``raw`` lie in it."""
        dict.clear(self)
        dict.update(self, raw)


class States(defaultdict[Any, Any]):
    """``optimizer.state``: torch's defaultdict, whose dictionaries are entries."""

    def __init__(self) -> None:
        super().__init__(Entry)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, dict) and not isinstance(value, Entry):
            entry = Entry()
            entry.set_raw(value)
            value = entry
        super().__setitem__(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As a dictionary's."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dictionary's."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _plain_states, ({key: _plain_entry(value) for key, value in self.items()},)

    def parked(self) -> Iterator[Parked]:
        """All that is off the device, each once."""
        seen: set[int] = set()
        for entry in list(self.values()):
            for leaf in leaves(entry.raw() if isinstance(entry, Entry) else entry):
                if isinstance(leaf, Parked) and id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield leaf


def _plain_states(entries: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, entries)


def _plain_entry(entry: Any) -> Any:
    return dict(entry) if isinstance(entry, Entry) else entry


def _shown(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, Parked) else leaf


def is_movable(value: object) -> bool:
    """Whether it is a tensor of torch's own kinds that can be moved by its bytes."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
    )


def is_large(tensor: torch.Tensor) -> bool:
    """Whether it leaves the device; step counts and the like stay where the optimizer has them."""
    return tensor.dim() > 0 and tensor.numel() > 1


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with the function applied to what lists, tuples and dictionaries contain."""
    kind = type(value)
    if kind in (list, tuple):
        return kind(map_leaves(each, function) for each in value)
    if kind is dict:
        return {key: map_leaves(each, function) for key, each in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries contain, at any depth."""
    kind = type(value)
    if kind in (list, tuple, dict):
        inner: Iterable[Any] = value.values() if kind is dict else value
        for each in inner:
            yield from leaves(each)
    else:
        yield value
