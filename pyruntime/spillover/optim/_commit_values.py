"""Values of a commit as JSON that gives back what it was given, and the states of generators.

Nothing is pickled: what is read back cannot run code.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from typing import Any

import torch

from spillover._errors import ConfigError

_KIND = "~kind"


def dumps(value: Any) -> bytes:
    """JSON of None, bool, numbers, str, bytes, lists, tuples, dicts, tensors and NumPy arrays.

    Raises
    ------
    ConfigError
        Something else is in it.
    """
    return json.dumps(_encoded(value)).encode()


def loads(data: bytes) -> Any:
    """What :func:`dumps` was given. Tensors are on the CPU."""
    return _decoded(json.loads(data))


def _encoded(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encoded(each) for each in value]
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and _KIND not in value:
            return {key: _encoded(each) for key, each in value.items()}
        items = [[_encoded(key), _encoded(each)] for key, each in value.items()]
        return {_KIND: "dict", "items": items}
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [_encoded(each) for each in value]}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "data": _text(value)}
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        data = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        name = str(plain.dtype).removeprefix("torch.")
        return {_KIND: "tensor", "dtype": name, "shape": list(plain.shape), "data": _text(data)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        array = numpy.asarray(value)
        if array.dtype.kind in "biufc":
            kind = "array" if isinstance(value, numpy.ndarray) else "number"
            shape = list(array.shape)
            text = _text(array.tobytes())
            return {_KIND: kind, "dtype": array.dtype.str, "shape": shape, "data": text}
    if isinstance(value, int | float | str):  # An enumeration, or another class of numbers.
        return _encoded({int: int, float: float, str: str}[_base(value)](value))
    raise ConfigError(
        f"a commit cannot hold a {type(value).__name__}; it holds numbers, text, bytes, tensors, "
        "arrays, and lists, tuples and dicts of them"
    )


def _base(value: Any) -> type:
    return next(each for each in (int, float, str) if isinstance(value, each))


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: _decoded(each) for key, each in value.items()}
    if kind == "dict":
        return {_decoded(key): _decoded(each) for key, each in value["items"]}
    if kind == "tuple":
        return tuple(_decoded(each) for each in value["items"])
    data = base64.b64decode(value["data"])
    if kind == "bytes":
        return data
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        if not data:
            return torch.empty(value["shape"], dtype=dtype, device="cpu")
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(value["shape"])
    import numpy

    array = numpy.frombuffer(bytearray(data), dtype=value["dtype"]).reshape(value["shape"])
    return array if kind == "array" else array[()]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---- random numbers ----------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Of Python, NumPy where it is loaded, and torch on the CPU and on all devices."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def restore_random_states(states: dict[str, Any]) -> None:
    """Set all generators, of as many devices as there are now."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if torch.cuda.is_available():
        for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
