"""What Python code of a dry run gets where it asks for values that are not known.

Operators and copies know by themselves (``dry_values.hpp``); here are the ways from a tensor to
Python that are no operators, and the numbers that ``item()`` returns: most programs only print a
loss, and a number that is only printed decides nothing.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, NoReturn

from spillover._errors import SpilloverError
from spillover.emulator import _libraries

#: What this package's own code gets: it asks for norms of gradients, which are taken to be finite.
_ASSUMED = 1.0
_EMULATOR = __name__.rpartition(".")[0]
_UNKNOWN_TEXT = "spillover dry run: the program asks for a value"


class UnknownNumber(float):
    """A float that a dry run does not have. It can be printed and computed with, not decided by.

    It is a float, so that loggers and encoders take it; code in C that reads it in place sees NaN.
    """

    reason: str

    def __new__(cls, reason: str) -> UnknownNumber:
        """``reason`` is the text of the error that a decision raises."""
        number = super().__new__(cls, "nan")
        number.reason = reason
        return number

    def __repr__(self) -> str:
        return "unknown"

    def __str__(self) -> str:
        return "unknown"

    def __format__(self, specification: str) -> str:
        return "unknown"

    def __hash__(self) -> int:
        return super().__hash__()

    def _decide(self, *_: object) -> NoReturn:
        raise SpilloverError(self.reason)

    def _carry(self, *_: object) -> UnknownNumber:
        return self

    __bool__ = __int__ = __index__ = __trunc__ = __floor__ = __ceil__ = _decide
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _decide
    __float__ = is_integer = as_integer_ratio = hex = _decide
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _carry
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _carry
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _carry
    __neg__ = __pos__ = __abs__ = __round__ = _carry  # type: ignore[assignment]

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Answer NumPy's functions: those that compute carry on what is unknown, others ask."""
        if method == "__call__" and function.__name__ in _CARRYING:
            return self
        self._decide()


#: Functions of one or two numbers, in ``math`` and in NumPy, that only compute.
_CARRYING = frozenset((
    "absolute", "add", "cbrt", "divide", "exp", "exp2", "expm1", "fabs", "fmod", "hypot", "log",
    "log10", "log1p", "log2", "maximum", "minimum", "multiply", "negative", "pow", "power",
    "reciprocal", "remainder", "sqrt", "square", "subtract", "tanh", "true_divide",
))  # fmt: skip
_DECIDING = ("isclose", "isfinite", "isinf", "isnan")


def watch_math() -> None:
    """Have Python's functions on floats answer for unknown ones, which they would read in place.

    Call it before the program imports names from ``math``.
    """
    for name in (*_DECIDING, *_CARRYING):
        original = getattr(math, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(math, name, _watched(original, carries=name in _CARRYING))


def _watched(original: Any, *, carries: bool) -> Any:
    @functools.wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        for argument in arguments:
            if type(argument) is UnknownNumber:
                return argument if carries else argument._decide()
        return original(*arguments, **options)

    return function


def _is_engine(frame: Any) -> bool:
    """Whether the code is this package's: it hands memory on through views and never looks in."""
    return str(frame.f_globals.get("__name__", "")).startswith("spillover.")


def _engine_asks() -> bool:
    """Whether this package's code, other than the emulator's, is who called it."""
    frame: Any = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_EMULATOR):
        frame = frame.f_back
    return frame is not None and _is_engine(frame)


def is_unknown(tensor: Any) -> bool:
    """Whether a tensor on a device or the CPU has bytes that a dry run does not know."""
    import torch

    if tensor.device.type not in ("cuda", "cpu") or tensor.layout != torch.strided:
        return False
    if tensor.numel() == 0:
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return False  # a fake tensor, or another subclass without memory of its own
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return not _libraries.driver().spillover_emulator_is_known(address, _extent_bytes(tensor))


def _extent_bytes(tensor: Any) -> int:
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    elements: int = 1 + sum((size - 1) * stride for size, stride in strides)
    return elements * int(tensor.element_size())


def _set_known(tensor: Any) -> None:
    _libraries.driver().spillover_emulator_set_known(tensor.data_ptr(), _extent_bytes(tensor), 1)


def watch(torch: Any) -> None:
    """Replace the methods of ``torch.Tensor`` that read its memory without an operator."""
    tensor_class = torch.Tensor
    item, tolist, as_numpy, show = (
        tensor_class.item,
        tensor_class.tolist,
        tensor_class.numpy,
        tensor_class.__repr__,
    )

    def number_of(tensor: Any) -> Any:
        try:
            return item(tensor)
        except RuntimeError as error:
            text = str(error)
            if not text.startswith(_UNKNOWN_TEXT) or not tensor.is_floating_point():
                raise
            return UnknownNumber(text)

    def numbers_of(tensor: Any) -> Any:
        return [numbers_of(part) for part in tensor] if tensor.dim() else number_of(tensor)

    @functools.wraps(item)
    def unknown_item(self: Any) -> Any:
        number = number_of(self)
        is_assumed = type(number) is UnknownNumber and _engine_asks()
        return _ASSUMED if is_assumed else number

    @functools.wraps(tolist)
    def unknown_tolist(self: Any) -> Any:
        if self.is_floating_point() and _engine_asks():
            on_host = self.cpu()
            return tolist(torch.full_like(on_host, _ASSUMED) if is_unknown(on_host) else on_host)
        return numbers_of(self) if is_unknown(self) else tolist(self)

    @functools.wraps(as_numpy)
    def unknown_numpy(self: Any, *arguments: Any, **options: Any) -> Any:
        array = as_numpy(self, *arguments, **options)
        if self.device.type != "cpu" or not is_unknown(self) or _is_engine(sys._getframe(1)):
            return array
        value = item(self.detach().flatten()[0])  # raises under the policy "error"
        # Not by an operator, which would leave large pinned memory as it is.
        as_numpy(self.detach())[...] = value
        _set_known(self)
        return array

    @functools.wraps(show)
    def unknown_repr(self: Any, **options: Any) -> str:
        if is_unknown(self):
            size = tuple(self.shape)
            return f"tensor(unknown, size={size}, dtype={self.dtype}, device={self.device})"
        text: str = show(self, **options)
        return text

    tensor_class.item = unknown_item
    tensor_class.tolist = unknown_tolist
    tensor_class.numpy = unknown_numpy
    tensor_class.__repr__ = unknown_repr
