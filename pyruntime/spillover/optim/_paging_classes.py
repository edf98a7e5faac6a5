"""Which optimizers can be paged, in buckets or whole, and how buckets keep their mathematics.

Note [Parameters apart]
-----------------------
A class is updated in buckets if each parameter's new value depends on that parameter, its gradient
and its state alone, so that a step of some of the parameters, then of the others, is a step of all.
torch's classes do, but for four decisions that they take over all parameters of a group. Those are
taken here for the whole group, and each bucket is told:

- ``foreach=None`` means foreach kernels where all parameters of the group are plain tensors on a
  GPU, else a loop.
- Adagrad with a sparse gradient loops over all parameters of that device and dtype.
- Adafactor with ``eps=(None, …)`` takes epsilon from the first dtype of the group for all of it.
- SGD with foreach multiplies and adds momentum buffers one by one where one of them is new. The two
  ways compute the same products and sums, so nothing is done about it.

foreach falls back to one kernel a tensor for a whole group where strides or dtypes of one parameter
and its gradient differ; in buckets only that bucket does. Those kernels, too, compute the same
expressions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from spillover._errors import ConfigError
from spillover._units import format_bytes
from spillover.optim._paging_state import is_large, is_movable, leaves

# Of tensors that an optimizer has beside its state: more is state that would stay on the device.
_ELSEWHERE_BYTES_MAX = 64 << 10

Group = dict[str, Any]
_Sizes = Callable[[Group, torch.Tensor], list[int]]


def _copies(count: Callable[[Group], int]) -> _Sizes:
    """State of ``count`` tensors like the parameter."""

    def sizes(group: Group, parameter: torch.Tensor) -> list[int]:
        return [parameter.nbytes] * count(group) if is_large(parameter) else []

    return sizes


def _adafactor(group: Group, parameter: torch.Tensor) -> list[int]:
    if parameter.dim() < 2:
        return [parameter.nbytes] if is_large(parameter) else []
    item = parameter.element_size()
    rows = parameter.numel() // max(parameter.size(-1), 1)
    columns = parameter.numel() // max(parameter.size(-2), 1)
    return [count * item for count in (rows, columns) if count > 1]


#: Classes that update parameters independently, and the bytes of each state tensor that they make.
_IN_BUCKETS: dict[str, _Sizes] = {
    "Adadelta": _copies(lambda group: 2),
    "Adafactor": _adafactor,
    "Adagrad": _copies(lambda group: 1),
    "Adam": _copies(lambda group: 2 + bool(group["amsgrad"])),
    "AdamW": _copies(lambda group: 2 + bool(group["amsgrad"])),
    "Adamax": _copies(lambda group: 2),
    "ASGD": _copies(lambda group: 1),
    "Muon": _copies(lambda group: 1),
    "NAdam": _copies(lambda group: 2),
    "RAdam": _copies(lambda group: 2),
    "RMSprop": _copies(lambda group: 1 + (group["momentum"] > 0) + bool(group["centered"])),
    "Rprop": _copies(lambda group: 2),
    "SGD": _copies(lambda group: int(group["momentum"] != 0)),
}

_REFUSED = {
    "LBFGS": (
        "its history is flat vectors over all parameters, and it evaluates the closure many times "
        "a step; page nothing, or use history_size to make it smaller"
    ),
    "SparseAdam": (
        "it touches few rows of its state a step, and paging would move all of them; keep it on "
        "the device, or use torch.optim.Adam with dense gradients"
    ),
}


class Rules:
    """What paging knows of one class of optimizers."""

    def __init__(self, base: type[torch.optim.Optimizer]) -> None:
        self.base = base
        known = next(_known(base), None)
        self.name = known[0] if known else base.__name__
        self._sizes = known[1] if known else None

    @property
    def in_buckets(self) -> bool:
        """Whether parameters are updated independently."""
        return self._sizes is not None

    def expected(self, group: Group, parameter: torch.Tensor) -> list[int]:
        """Bytes of each tensor of the state that the first step will make; empty: not known."""
        return [] if self._sizes is None else self._sizes(group, parameter)

    def decisions(self, group: Group) -> Callable[[torch.Tensor], Group]:
        """What a bucket's group must say for the parameter; see Note [Parameters apart]."""
        parameters = [each for each in group["params"] if each.grad is not None]
        fixed: Group = {}
        if group.get("foreach", True) is None and not group.get("fused"):
            _, foreach = _default_to_fused_or_foreach(parameters, False, use_fused=False)
            if not foreach:
                fixed["foreach"] = False
        if self.name == "Adafactor" and group["eps"][0] is None and parameters:
            dtype = _first_dtype(parameters, bool(group["foreach"]))
            fixed["eps"] = (torch.finfo(dtype).eps, group["eps"][1])
        loops = set()
        if self.name == "Adagrad" and not group.get("fused"):
            loops = {(each.device, each.dtype) for each in parameters if each.grad.is_sparse}

        def decide(parameter: torch.Tensor) -> Group:
            if (parameter.device, parameter.dtype) in loops:
                return {**fixed, "foreach": False}
            return fixed

        return decide


def _known(base: type[torch.optim.Optimizer]) -> Iterator[tuple[str, _Sizes]]:
    """The tested class that ``base`` is, or derives from without a step of its own."""
    for name, sizes in _IN_BUCKETS.items():
        tested = getattr(torch.optim, name, None)
        if tested is None or not issubclass(base, tested):
            continue
        same = (
            inspect.unwrap(getattr(base, method)) is inspect.unwrap(getattr(tested, method))
            for method in ("step", "_init_group")
        )
        if all(same):
            yield name, sizes


def _first_dtype(parameters: list[torch.Tensor], foreach: bool) -> torch.dtype:
    if not foreach:
        return parameters[0].dtype
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype([list(parameters)])
    dtype = next(iter(grouped))[1]
    assert dtype is not None
    return dtype


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError, saying why, for an optimizer that cannot be paged."""
    name = type(optimizer).__name__
    for refused, reason in _REFUSED.items():
        kind = getattr(torch.optim, refused, None)
        if kind is not None and isinstance(optimizer, kind):
            raise ConfigError(f"{name} cannot be paged: {reason}")
    if any(each.__module__.startswith("spillover.") for each in type(optimizer).__mro__):
        raise ConfigError(f"{name} of spillover.optim has its state off the device by itself")
    for group in optimizer.param_groups:
        check_group(name, group)
    for key, entry in optimizer.state.items():
        check_entry(name, key, entry)
    _check_elsewhere(optimizer)


def check_group(name: str, group: Group) -> None:
    """Raise ConfigError for a parameter group that cannot be paged."""
    if group.get("differentiable"):
        raise ConfigError(
            f"{name} with differentiable=True cannot be paged: autograd would hold its state on "
            "the device until backward; use differentiable=False"
        )
    for parameter in group["params"]:
        if not is_movable(parameter):
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} is {_kind_of(parameter)}, whose "
                "state cannot be moved by its bytes; page optimizers of plain parameters"
            )


def check_entry(name: str, key: object, entry: Any) -> None:
    """Raise ConfigError where a state holds what cannot be moved by its bytes."""
    for leaf in leaves(dict(entry) if isinstance(entry, dict) else entry):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda and not is_movable(leaf):
            whose = f" of shape {tuple(key.shape)}" if isinstance(key, torch.Tensor) else ""
            raise ConfigError(
                f"{name} keeps {_kind_of(leaf)} in the state of a parameter{whose}, which cannot "
                "be moved by its bytes, so this optimizer cannot be paged"
            )


def _kind_of(tensor: torch.Tensor) -> str:
    kind = type(tensor)
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    return f"a {kind.__module__}.{kind.__qualname__}"


def _check_elsewhere(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that keeps state where torch's do not, as far as that can be seen."""
    name = type(optimizer).__name__
    known = {id(each) for group in optimizer.param_groups for each in group["params"]}
    found_bytes = 0
    found = []
    for attribute, value in vars(optimizer).items():
        if attribute in ("state", "param_groups", "defaults"):
            continue
        for leaf in leaves(value):
            if isinstance(leaf, torch.optim.Optimizer):
                raise ConfigError(
                    f"{name} has another optimizer in its attribute {attribute!r}; page that one"
                )
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda and id(leaf) not in known:
                found_bytes += leaf.nbytes
                found.append(attribute)
    if found_bytes > _ELSEWHERE_BYTES_MAX:
        raise ConfigError(
            f"{name} keeps {format_bytes(found_bytes)} on the device outside of optimizer.state, "
            f"in {', '.join(sorted(set(found)))}, which paging could not move; only optimizers "
            "whose state is in optimizer.state can be paged"
        )
