"""What is compared between the CPU and the emulated device for one operator.

For each of the operator's first samples: the outputs, what became of its arguments, and the
gradients of all differentiable inputs for the same random cotangent. A sample whose CPU result
changes with the seed is random, and goes to ``_distribution.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import unittest
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import _opdb
from benchmarks._opdb import _accesses, _distribution, _references

SAMPLES = 4
_SEED = 20
#: For operators without the wanted type, the first of these that they have.
_TYPES = (
    torch.float32,
    torch.complex64,
    torch.int64,
    torch.bool,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
)

_WIDE_TYPES = {torch.bfloat16: torch.float32}
if hasattr(torch, "bcomplex32"):
    _WIDE_TYPES[torch.bcomplex32] = torch.complex64
#: What rounding to bfloat16 may cost.
_NARROW = {"rtol": 1.6e-2, "atol": 1e-5}


def database() -> dict[str, Any]:
    """Torch's operators by name, with the variant's name where there are several."""
    from torch.testing._internal import common_methods_invocations as invocations

    # Random operators are wrapped so that each call sets the same seed; here the caller sets it.
    invocations.wrapper_set_seed = lambda function, *args, **kwargs: function(*args, **kwargs)
    return {op.formatted_name: op for op in invocations.op_db}


@dataclass(frozen=True)
class Sample:
    """A call of an operator on one device."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    process: Callable[[Any], Any]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in((self.arguments, self.keywords))

    def copy(self, function: Callable[[Any], Any]) -> Sample:
        """The same call with every leaf of its arguments replaced."""
        arguments, keywords = pytree.tree_map(function, (self.arguments, self.keywords))
        return Sample(arguments, keywords, self.process)


class Mirror:
    """Makes tensors on a device, with the strides and the shared storages of the originals."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, value: Any) -> Any:
        """The device's counterpart of a leaf: a tensor, a device, or anything else as it is."""
        if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu"):
            return self._device
        if isinstance(value, torch.Generator):
            return torch.Generator(self._device).manual_seed(value.initial_seed())
        if not isinstance(value, Tensor):
            return value
        with torch.no_grad():
            mirrored = self._mirror(value.detach())
        return mirrored.requires_grad_(value.requires_grad)

    def _mirror(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_nested or tensor._is_zerotensor():
            return tensor.to(self._device, copy=True)
        if tensor.is_conj():
            return self._mirror(tensor.conj()).conj()
        if tensor.is_neg():
            return torch._neg_view(self._mirror(torch._neg_view(tensor)))
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            clone = torch.UntypedStorage(storage.nbytes(), device=self._device)
            clone.copy_(storage)
            self._storages[key] = clone
        empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return empty.set_(
            self._storages[key], tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Outcome:
    """What a call gave: its outputs, its arguments afterwards, and gradients."""

    outputs: Any
    arguments: list[Tensor]
    gradients: list[Tensor | None] | None


def execute(
    function: Callable[..., Any], sample: Sample, *, backward: bool, seed: int = _SEED
) -> Outcome:
    """Call the operator and, if asked to, its backward with cotangents drawn from the seed."""
    torch.manual_seed(seed)
    outputs = sample.process(function(*sample.arguments, **sample.keywords))
    inputs = [tensor for tensor in sample.tensors() if tensor.requires_grad]
    gradients: list[Tensor | None] | None = None
    differentiable = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    if backward and inputs and differentiable:
        gradients = _backward(differentiable, inputs)
    return Outcome(outputs, sample.tensors(), gradients)


def _backward(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    dense = [o if o.layout == torch.strided else o.to_dense() for o in outputs]
    generator = torch.Generator().manual_seed(_SEED)
    cotangents = [
        torch.randn(o.shape, dtype=o.dtype, generator=generator).to(o.device) for o in dense
    ]
    return list(torch.autograd.grad(dense, inputs, cotangents, allow_unused=True))


def check_equal(
    actual: Any,
    expected: Any,
    epsilons: float | None = None,
    *,
    anywhere: bool = False,
) -> None:
    """Raise AssertionError unless both trees hold the same leaves, the actual ones on the device.

    ``epsilons`` allows differences of so many units of the type's precision, relative to the
    largest element; otherwise torch's usual tolerances hold.
    """
    actual_leaves, actual_tree = pytree.tree_flatten(actual)
    expected_leaves, expected_tree = pytree.tree_flatten(expected)
    assert actual_tree == expected_tree, f"{actual_tree} is not {expected_tree}"
    for ours, theirs in zip(actual_leaves, expected_leaves, strict=True):
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor), f"{ours!r} is not a tensor"
            assert anywhere or ours.is_cuda, f"a result is on {ours.device}"
            result, limits = ours.detach(), {}
            is_inexact = theirs.is_floating_point() or theirs.is_complex()
            if epsilons is not None and theirs.numel() and is_inexact:
                information = torch.finfo(ours.dtype.to_real())
                limit = epsilons * information.eps * float(theirs.abs().max())
                limits = {"rtol": 16 * information.eps, "atol": max(limit, 1e-4)}
            if _WIDE_TYPES.get(result.dtype) == theirs.dtype:
                result, limits = result.to(theirs.dtype), limits or _NARROW
            torch.testing.assert_close(
                result.cpu(), theirs.detach().cpu(), equal_nan=True, **limits
            )
        elif isinstance(theirs, torch.device):
            assert ours.type == "cuda"
        elif isinstance(theirs, int | float | complex) and not isinstance(theirs, bool):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        else:
            assert ours == theirs, f"{ours!r} is not {theirs!r}"


def agree(first: Outcome, second: Outcome) -> bool:
    """Whether two results of the CPU are the same."""
    try:
        for one, other in zip(tensors_in(first.outputs), tensors_in(second.outputs), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
    except (AssertionError, ValueError):
        return False
    return True


class Comparison:
    """Compares operators in one mode: a type of their samples, or the sparse layouts."""

    def __init__(self, mode: _opdb.Mode) -> None:
        self._mode = mode
        self._exceptions = _opdb.exceptions()
        self._compared: set[str] = set()
        self._cpu_errors: list[str] = []

    def compare(self, op: Any) -> dict[str, Any]:
        """The result of one operator: its status, what was compared, and a detail."""
        name = op.formatted_name
        if name in self._exceptions["skip"]:
            return {"status": "skip", "detail": self._exceptions["skip"][name], "compared": []}
        dtype = self._type_of(op)
        if dtype is None:
            return {"status": "absent", "detail": "", "compared": []}
        self._compared, self._cpu_errors = set(), []
        status, detail = "pass", ""
        try:
            if self._mode == "accesses":
                self._audit(op, dtype)
            else:
                self._compare_samples(op, dtype)
            if not self._compared and self._mode == "sparse" and not self._cpu_errors:
                status = "absent"
            elif not self._compared:
                status, detail = "fail", "nothing to compare: " + "; ".join(self._cpu_errors)
        except Exception as error:
            status, detail = "fail", f"{type(error).__name__}: {error}"
        torch.cuda.synchronize()
        return {"status": status, "detail": detail, "compared": sorted(self._compared)}

    def _type_of(self, op: Any) -> torch.dtype | None:
        if self._mode == "bfloat16":
            return torch.bfloat16 if torch.bfloat16 in op.dtypesIfCUDA else None
        if self._mode == "sparse" and not _layouts_of(op):
            return None
        both = [dtype for dtype in _TYPES if dtype in op.dtypes and dtype in op.dtypesIfCUDA]
        candidates = both or [dtype for dtype in _TYPES if dtype in op.dtypesIfCUDA]
        return candidates[0] if candidates else torch.float32

    def _is_differentiable(self, op: Any, dtype: torch.dtype) -> bool:
        return (
            self._mode != "bfloat16"
            and op.supports_autograd
            and dtype in op.supported_backward_dtypes("cuda")
        )

    def _samples_of(self, op: Any, dtype: torch.dtype, backward: bool) -> Iterator[Any]:
        torch.manual_seed(_SEED)
        if self._mode != "sparse":
            yield from itertools.islice(
                op.sample_inputs("cpu", dtype, requires_grad=backward), SAMPLES
            )
            return
        for layout in _layouts_of(op):
            try:
                samples = op.sample_inputs_sparse(layout, "cpu", dtype, requires_grad=backward)
                yield from itertools.islice(samples, SAMPLES)
            except NotImplementedError:
                dense = op.sample_inputs("cpu", dtype, requires_grad=False)
                yield from itertools.islice(_in_layout(dense, layout, backward), SAMPLES)
            except unittest.SkipTest:
                continue

    def _compare_samples(self, op: Any, dtype: torch.dtype) -> None:
        backward = self._is_differentiable(op, dtype)
        for index, drawn in enumerate(self._samples_of(op, dtype, backward)):
            process = drawn.output_process_fn_grad
            sample = Sample((drawn.input, *drawn.args), dict(drawn.kwargs), process)
            try:
                self._compare_sample(op, sample, backward)
            except Exception as error:
                error.args = (f"sample {index}: {error}",)
                raise

    def _audit(self, op: Any, dtype: torch.dtype) -> None:
        """Check the first sample's declared accesses; see ``_accesses.py``."""
        backward = self._is_differentiable(op, dtype)
        functions = _references.PAIRS.get(op.formatted_name, _references.Pair(op.op, op.op))
        drawn = next(iter(self._samples_of(op, dtype, backward)))
        sample = Sample(
            (drawn.input, *drawn.args), dict(drawn.kwargs), drawn.output_process_fn_grad
        )
        on_device = self._on_device(op.formatted_name, sample)
        audit = _accesses.Audit()
        with audit:
            execute(functions.on_device, on_device, backward=backward)
        assert not audit.defects, "; ".join(sorted(set(audit.defects)))
        self._compared.add("accesses")

    def _compare_sample(self, op: Any, sample: Sample, backward: bool) -> None:
        name = op.formatted_name
        functions = _references.PAIRS.get(name, _references.Pair(op.op, op.op))
        on_device = self._on_device(name, sample)
        expected = self._on_cpu(functions.on_cpu, sample, backward, _SEED)
        if expected is None and backward:
            # The CPU has no backward for these arguments (sparse ones above all).
            backward = False
            expected = self._on_cpu(functions.on_cpu, sample, backward, _SEED)
        if expected is None:
            return
        if name in self._exceptions["uninitialised"]:
            actual = execute(functions.on_device, on_device, backward=False)
            check_equal(
                pytree.tree_map(_shape_of, actual.outputs),
                pytree.tree_map(_shape_of, expected.outputs),
            )
            self._compared.add("shape")
            return
        if self._is_random(functions.on_cpu, sample, expected):
            self._compare_distributions(functions, name, sample, backward)
            return
        actual = execute(functions.on_device, on_device, backward=backward)
        try:
            self._check(name, actual, expected)
        except AssertionError:
            # Few draws of few values may agree by chance.
            if not self._is_random(functions.on_cpu, sample, expected, seeds=8):
                raise
            self._compare_distributions(functions, name, sample, backward)

    def _check(self, name: str, actual: Outcome, expected: Outcome) -> None:
        epsilons = self._exceptions["tolerance"].get(name, {}).get(self._mode)
        check_equal(actual.outputs, expected.outputs, epsilons)
        moved = self._exceptions["host_arguments"]
        check_equal(actual.arguments, expected.arguments, epsilons, anywhere=name in moved)
        self._compared.add("forward")
        if expected.gradients is not None:
            assert actual.gradients is not None, "no output is differentiable"
            check_equal(actual.gradients, expected.gradients, epsilons)
            self._compared.add("backward")

    def _on_device(self, name: str, sample: Sample) -> Sample:
        moved = sample.copy(Mirror("cuda"))
        if name not in self._exceptions["host_arguments"]:
            return moved
        here = sample.copy(Mirror("cpu"))
        return Sample((moved.arguments[0], *here.arguments[1:]), here.keywords, here.process)

    def _is_random(
        self, function: Callable[..., Any], sample: Sample, expected: Outcome, seeds: int = 1
    ) -> bool:
        """Whether another seed gives the CPU another result."""
        for seed in range(_SEED + 1, _SEED + 1 + seeds):
            again = self._on_cpu(function, sample, False, seed)
            if again is not None and not agree(expected, again):
                return True
        return False

    def _compare_distributions(
        self, functions: _references.Pair, name: str, sample: Sample, backward: bool
    ) -> None:
        def draw(device: str, seed: int) -> Outcome:
            if device == "cuda":
                moved = self._on_device(name, sample)
                return execute(functions.on_device, moved, backward=backward, seed=seed)
            copied = sample.copy(Mirror("cpu"))
            return execute(functions.on_cpu, copied, backward=backward, seed=seed)

        _distribution.check(draw)
        self._compared.add("distribution")

    def _on_cpu(
        self, function: Callable[..., Any], sample: Sample, backward: bool, seed: int
    ) -> Outcome | None:
        """The CPU's result, or None where it has none to compare with.

        Where CUDA has an operator in half precision and the CPU has not, the reference is the
        result in single precision.
        """
        copied = sample.copy(Mirror("cpu"))
        try:
            return execute(function, copied, backward=backward, seed=seed)
        except Exception as error:
            if self._mode == "bfloat16":
                with contextlib.suppress(Exception):
                    return execute(function, copied.copy(_widened), backward=backward, seed=seed)
            self._cpu_errors.append(f"{type(error).__name__}: {error}")
            return None


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _WIDE_TYPES.get(leaf, leaf)
    if isinstance(leaf, Tensor):
        return leaf.to(_WIDE_TYPES.get(leaf.dtype, leaf.dtype))
    return leaf


def _layouts_of(op: Any) -> list[torch.layout]:
    supported = {
        torch.sparse_coo: op.supports_sparse,
        torch.sparse_csr: op.supports_sparse_csr,
        torch.sparse_csc: op.supports_sparse_csc,
        torch.sparse_bsr: op.supports_sparse_bsr,
        torch.sparse_bsc: op.supports_sparse_bsc,
    }
    return [layout for layout, yes in supported.items() if yes]


def _in_layout(samples: Iterable[Any], layout: torch.layout, differentiable: bool) -> Iterator[Any]:
    """Samples of matrices with the input in a sparse layout."""
    for sample in samples:
        if not isinstance(sample.input, Tensor) or sample.input.dim() != 2:
            continue
        blocks = (1, 1) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
        sample.input = sample.input.to_sparse(layout=layout, blocksize=blocks)
        sample.input.requires_grad_(differentiable)
        yield sample


def _shape_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (tuple(leaf.shape), leaf.stride(), str(leaf.dtype), str(leaf.layout), leaf.requires_grad)
