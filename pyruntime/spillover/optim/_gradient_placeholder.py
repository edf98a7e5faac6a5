"""What ``.grad`` is while the gradient is on the host: a tensor without bytes that tells the truth.

Note [Placeholders]
-------------------
A placeholder has shape, strides, type and device of the gradient, and no memory. It is a wrapper
subclass: every operator that gets one arrives here. Those of the table below work on the host, or
on figures alone: what autograd, clipping, GradScaler, ``zero_grad`` and DDP do. For any other
operator the gradient is fetched, and gone again when the operator has run. Where an operator writes
to it, makes a view of it, or is not torch's own (an all-reduce; nobody knows what it does), the
gradient stays on the device from then on (Note [Where a gradient is]), so that nothing that is
written is lost.

Views of the placeholder as a whole (``detach()``, ``.data``) are placeholders of the same gradient.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from spillover.optim._gradient_sharing import is_shared_addend
from spillover.optim._host_gradient import HostGradient, PendingGradient, Place, are_finite

aten = torch.ops.aten

_NO_GRAPH_TASK = -1


class OffloadedGradient(torch.Tensor):
    """A gradient in host memory; see Note [Placeholders].

    ``repr()``, ``tolist()`` and ``copy.deepcopy()`` give what those of the gradient would; a pickle
    has the gradient as an ordinary tensor.
    """

    _host: HostGradient

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: HostGradient) -> OffloadedGradient:
        made: OffloadedGradient = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride, dtype=host.dtype, device=host.device
        )
        made._host = host
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator; see the note."""
        if func is aten.add_.Tensor and not kwargs and torch.is_tensor(args[1]):
            result = _add_whole(args)
            if result is not NotImplemented:
                return result
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _run_on_device(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(_fetched(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _fetched(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = memo[id(self)] = _fetched(self)
        return copied

    @property
    def data(self) -> torch.Tensor:
        """A placeholder of the same gradient. Setting it replaces it, as in ``model.double()``."""
        alias: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return alias

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            host = self._host.replaced_by(value)
        # Takes over shape, type and device, and no memory.
        torch.Tensor.data.__set__(self, OffloadedGradient(host))  # type: ignore[attr-defined]
        self._host = host

    # What gives addresses gives those of memory that stays.

    def data_ptr(self) -> int:
        """Of the gradient on the device, where it is from now on."""
        return int(_kept(self).data_ptr())

    def untyped_storage(self) -> torch.UntypedStorage:
        """As :meth:`data_ptr`."""
        return _kept(self).untyped_storage()

    def storage(self) -> Any:
        """As :meth:`data_ptr`."""
        return _kept(self).storage()  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return _kept(self).__dlpack__(*args, **kwargs)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """As :meth:`data_ptr`."""
        found: dict[str, Any] = _kept(self).__cuda_array_interface__
        return found

    def tolist(self) -> Any:
        """The elements as Python numbers."""
        return self._host.to_host().tolist()


def host_of(tensor: object) -> HostGradient | None:
    """The gradient behind a placeholder; None for anything else."""
    return tensor._host if isinstance(tensor, OffloadedGradient) else None


def pending_gradient(parameter: torch.Tensor) -> PendingGradient | None:
    """The gradient of a parameter for an optimizer to read on the host.

    None where it is no placeholder, or lies in another order than the parameter; ``.grad`` is
    then read as any tensor. Does not wait for the gradient: its ``wait()`` does. What becomes of
    ``.grad`` from now on, such as clipping, zeroing or another backward, does not change it.

    Raises
    ------
    HostOutOfMemory
        The gradient is zeros, or was brought back to the device, and there is no memory for it.
    """
    gradient = parameter.grad
    host = host_of(gradient)
    if host is None or gradient is None or gradient.stride() != parameter.stride():
        return None
    return host.lease()


@contextlib.contextmanager
def fetched_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Have ``.grad`` be ordinary tensors meanwhile, for code that reads each more than once.

    What is written to them is lost. Raises torch.OutOfMemoryError, with all as it was.
    """
    replaced: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for parameter in parameters:
            gradient, host = parameter.grad, host_of(parameter.grad)
            if gradient is None or host is None:
                continue
            here = host.to_device() if host.place is Place.DEVICE else host.fetch()
            replaced.append((parameter, gradient))
            parameter.grad = here
            del here
        yield
    finally:
        for parameter, gradient in replaced:
            parameter.grad = gradient


def _note_read(host: HostGradient) -> None:
    if torch._C._current_graph_task_id() != _NO_GRAPH_TASK:
        host.owner.was_read_in_backward()


def _fetched(placeholder: OffloadedGradient) -> torch.Tensor:
    _note_read(placeholder._host)
    with torch.no_grad():
        return placeholder._host.fetch()


def _kept(placeholder: OffloadedGradient) -> torch.Tensor:
    _note_read(placeholder._host)
    with torch.no_grad():
        return placeholder._host.to_device()


# ---- any operator ------------------------------------------------------------------------------


def _run_on_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    schema = func._schema
    is_known = func.namespace in ("aten", "prims")
    written: dict[int, OffloadedGradient] = {}

    def unwrap(value: Any, is_kept: bool) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, OffloadedGradient):
                return leaf
            if not is_kept:
                return _fetched(leaf)
            kept = _kept(leaf)
            written[id(kept)] = leaf
            return kept

        return tree_map(one, value)

    def is_kept(argument: Any) -> bool:
        return not is_known or argument.alias_info is not None

    by_name = {argument.name: argument for argument in schema.arguments}
    new_args = [
        unwrap(value, is_kept(argument))
        for value, argument in zip(args, schema.arguments, strict=False)
    ]
    new_kwargs = {name: unwrap(value, is_kept(by_name[name])) for name, value in kwargs.items()}
    result = func(*new_args, **new_kwargs)
    # An operator that gives back what it has written to gives back the placeholder.
    return tree_map(lambda leaf: written.get(id(leaf), leaf), result)


# ---- operators that work on the host -----------------------------------------------------------

_Handler = Callable[..., Any]
_HANDLERS: dict[Any, _Handler] = {}


def _handles(*functions: Any) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for function in functions:
            _HANDLERS[function] = handler
        return handler

    return register


@_handles(aten.detach.default, aten.alias.default)
def _alias(func: Any, self: torch.Tensor) -> Any:
    host = host_of(self)
    return NotImplemented if host is None else OffloadedGradient(host)


@_handles(aten.clone.default)
def _clone(func: Any, self: torch.Tensor, *, memory_format: Any = None) -> Any:
    if memory_format not in (None, torch.preserve_format) or host_of(self) is None:
        return NotImplemented
    assert isinstance(self, OffloadedGradient)
    return _fetched(self)


@_handles(aten._to_copy.default)
def _to_copy(func: Any, self: torch.Tensor, **options: Any) -> Any:
    host, device = host_of(self), options.get("device")
    if host is None or device is None or torch.device(device).type != "cpu":
        return NotImplemented
    return func(host.to_host(), **options)


@_handles(aten.record_stream.default)
def _record_stream(func: Any, self: torch.Tensor, stream: Any) -> Any:
    host = host_of(self)
    # There is no memory that the stream could use.
    return NotImplemented if host is None or host.place is Place.DEVICE else None


def _add_whole(args: tuple[Any, ...]) -> Any:
    """AccumulateGrad's ``add_``; the arguments as they came, since references are counted."""
    host = host_of(args[0])
    if host is None or isinstance(args[1], OffloadedGradient) or not _can_be_added(host, args[1]):
        return NotImplemented
    is_shared = torch._C._current_graph_task_id() == _NO_GRAPH_TASK or is_shared_addend(args)
    host.add(args[1], is_shared=is_shared)
    return args[0]


@_handles(aten.add_.Tensor)
def _add(func: Any, self: torch.Tensor, other: Any, *, alpha: float = 1) -> Any:
    host = host_of(self)
    if host is None or not _can_be_added(host, other):
        return NotImplemented
    if isinstance(other, OffloadedGradient):
        other = _fetched(other)
    host.add(other * alpha)  # A tensor of our own.
    return self


def _can_be_added(host: HostGradient, other: Any) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and other.layout is torch.strided
        and other.device == host.device
        and other.dtype == host.dtype
        and other.shape == host.shape
    )


@_handles(aten.copy_.default)
def _copy(func: Any, self: torch.Tensor, source: Any, non_blocking: bool = False) -> Any:
    host = host_of(self)
    if host is None or source.shape != self.shape:
        return NotImplemented
    if isinstance(source, OffloadedGradient):
        if source._host is host:
            return self
        source = _fetched(source)
    host.assign(source, is_shared=True)
    return self


@_handles(aten.zero_.default)
def _zero(func: Any, self: torch.Tensor) -> Any:
    host = host_of(self)
    if host is None:
        return NotImplemented
    if host.place is Place.DEVICE:
        assert host.on_device is not None
        host.on_device.zero_()  # There may be views of it.
    else:
        host.set_to_zero()
    return self


@_handles(aten.mul_.Tensor, aten.mul_.Scalar)
def _multiply(func: Any, self: torch.Tensor, other: Any) -> Any:
    host = host_of(self)
    if host is None or not _is_number(other):
        return NotImplemented
    host.scale(_number(other))
    return self


@_handles(aten.div_.Tensor, aten.div_.Scalar)
def _divide(func: Any, self: torch.Tensor, other: Any) -> Any:
    host = host_of(self)
    if host is None or not _is_number(other) or _number(other) == 0.0:
        return NotImplemented
    host.scale(1.0 / _number(other))
    return self


@_handles(aten.clamp_.default)
def _clamp(func: Any, self: torch.Tensor, min: Any = None, max: Any = None) -> Any:
    host = host_of(self)
    if host is None:
        return NotImplemented
    host.modify(lambda flat: flat.clamp_(min, max))
    return self


@_handles(aten.clamp_min_.default)
def _clamp_min(func: Any, self: torch.Tensor, min: Any) -> Any:
    return _clamp(func, self, min=min)


@_handles(aten.clamp_max_.default)
def _clamp_max(func: Any, self: torch.Tensor, max: Any) -> Any:
    return _clamp(func, self, max=max)


@_handles(aten.isnan.default, aten.isinf.default)
def _is_strange(func: Any, self: torch.Tensor) -> Any:
    host = host_of(self)
    if host is None or host.place is Place.DEVICE:
        return NotImplemented
    if host.is_finite():
        return torch.empty_strided(
            host.shape, host.stride, dtype=torch.bool, device=host.device
        ).zero_()
    return host.on_host(func).to(host.device)


@_handles(aten.linalg_vector_norm.default)
def _vector_norm(
    func: Any,
    self: torch.Tensor,
    ord: float = 2.0,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    host = host_of(self)
    is_whole = dim is None or len(dim) == 0 or len(set(dim)) == self.ndim
    if host is None or not is_whole or (keepdim and self.ndim > 0):
        return NotImplemented
    return _norm(host, float(ord), dtype)


def _norm(host: HostGradient, order: float, dtype: torch.dtype | None) -> torch.Tensor:
    """In the type that torch would give it, on the device of the gradient."""
    found = host.norm_on_device() if order == 2.0 else None
    if found is None:
        found = torch.full((), host.norm(order), dtype=torch.float64, device=host.device)
    return found.to(dtype or host.dtype, copy=True)


@_handles(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _check_and_unscale(
    func: Any, gradients: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor
) -> None:
    """GradScaler's; see Note [Where a gradient is] for the factor."""
    hosts = [host for host in map(host_of, gradients) if host is not None]
    others = [gradient for gradient in gradients if host_of(gradient) is None]
    if others:
        func(others, found_inf, inv_scale)
    if not all(are_finite(hosts)):
        found_inf.fill_(1.0)
    scale = _number(inv_scale)
    for host in hosts:
        host.scale(scale)


# ---- foreach: one after another ----------------------------------------------------------------


def _each(single: Any) -> Callable[..., Any]:
    """A handler that applies an operator in place to one tensor after another."""

    def run(func: Any, tensors: Sequence[torch.Tensor], *arguments: Any, **options: Any) -> None:
        for index, tensor in enumerate(tensors):
            own = [
                argument[index] if isinstance(argument, (list, tuple)) else argument
                for argument in arguments
            ]
            single(tensor, *own, **options)

    return run


for _name, _overloads, _single in (
    ("_foreach_zero_", ("default",), torch.Tensor.zero_),
    ("_foreach_mul_", ("Scalar", "ScalarList", "Tensor", "List"), torch.Tensor.mul_),
    ("_foreach_div_", ("Scalar", "ScalarList", "Tensor", "List"), torch.Tensor.div_),
    ("_foreach_add_", ("List",), torch.Tensor.add_),
    ("_foreach_copy_", ("default",), torch.Tensor.copy_),
    ("_foreach_clamp_min_", ("Scalar", "ScalarList"), torch.Tensor.clamp_min_),
    ("_foreach_clamp_max_", ("Scalar", "ScalarList"), torch.Tensor.clamp_max_),
):
    for _overload in _overloads:
        _handles(getattr(getattr(aten, _name), _overload))(_each(_single))


@_handles(aten._foreach_norm.Scalar)
def _foreach_norm(
    func: Any,
    tensors: Sequence[torch.Tensor],
    ord: float = 2.0,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    return [torch.linalg.vector_norm(tensor, ord, dtype=dtype) for tensor in tensors]


# ---- numbers -----------------------------------------------------------------------------------

# What was read last: clipping multiplies every gradient by one tensor.
_last_number: tuple[weakref.ref[torch.Tensor], int, float] | None = None


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.ndim == 0 and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """The value of a number or of a tensor of one element; waits for the device."""
    global _last_number
    if not isinstance(value, torch.Tensor):
        return float(value)
    last = _last_number
    if last is not None and last[0]() is value and last[1] == value._version:
        return last[2]
    number = float(value.item())
    _last_number = (weakref.ref(value), value._version, number)
    return number
