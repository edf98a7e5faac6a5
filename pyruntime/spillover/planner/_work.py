"""A training step's compute and bytes from a module on the meta device, where nothing is computed.

The module's forward and backward run under a dispatch mode that prices each aten operator with the
cost model of a profile. ``scaled_dot_product_attention`` counts as the fused kernel that a card
runs; on the meta device torch would take it apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spillover._errors import ConfigError
from spillover.emulator import Profile, costs
from spillover.planner._bounds import MicroStep, StepWork

if TYPE_CHECKING:
    import torch

#: Adam: fp32 moments, and an fp32 master of a weight of lower precision.
_MOMENTS_BYTES = 8
_MASTER_BYTES = 4


def measure(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    profile: Profile,
    *,
    micro_steps: int = 1,
) -> StepWork:
    """Price one training step of ``module`` with Adam.

    Parameters
    ----------
    module
        On the meta device. Its output, or the first tensor of it, is summed for backward: put the
        loss into the module, so that it counts.
    inputs
        Tensors on the meta device; their shapes and dtypes are the micro-batch.
    profile
        Card whose cost model prices the operators.
    micro_steps
        Micro-steps of a step, each of which costs the same.

    Returns
    -------
    StepWork
        What ``step_bound`` takes. Nothing is recomputed and activations are deduplicated by
        storage. Times contain the card's kernels but neither launches nor the gaps between them.

    Raises
    ------
    ConfigError
        The module or an input is not on the meta device, or the output has no tensor.
    """
    import torch

    if micro_steps < 1:
        raise ConfigError(f"micro_steps must be at least 1, got {micro_steps}")
    parameters = {id(p): p for p in module.parameters()}.values()
    for tensor in (*parameters, *module.buffers(), *inputs):
        if not tensor.is_meta:
            raise ConfigError(
                "measure() takes a module and inputs on the meta device; build them under "
                f"torch.device('meta'), or use .to('meta'): found a tensor on {tensor.device}"
            )
    pricing = _Pricing(profile)
    kept = {tensor.untyped_storage()._cdata for tensor in (*parameters, *module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            saved[storage._cdata] = storage
        return tensor

    with pricing.mode(), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = _first_tensor(module(*inputs))
        forward_ns = pricing.take()
        activation_bytes = sum(storage.nbytes() for storage in saved.values())
        torch.autograd.backward([output], [torch.empty_like(output)])
        backward_ns = pricing.take()
    for parameter in parameters:
        parameter.grad = None
    trained = [p for p in parameters if p.requires_grad]
    masters = sum(p.numel() for p in trained if p.element_size() < 4) * _MASTER_BYTES
    state = sum(p.numel() for p in trained) * _MOMENTS_BYTES + masters
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    return StepWork(
        micro_steps=(MicroStep(forward_ns=forward_ns, backward_ns=backward_ns),) * micro_steps,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        gradient_bytes=trained_bytes,
        optimizer_bytes=state,
        # State and masters are read and written; gradients read, weights written (fp32 weights are
        # their own masters, so they are read as well).
        update_bytes=2 * state
        + 2 * trained_bytes
        + sum(p.numel() * p.element_size() for p in trained if p.element_size() >= 4),
        activation_bytes=activation_bytes,
    )


def _first_tensor(output: Any) -> torch.Tensor:
    import torch

    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Mapping | Sequence):
        for value in values:
            if isinstance(value, torch.Tensor):
                return value
    raise ConfigError(f"the module returned {type(output).__name__}, in which there is no tensor")


class _Pricing:
    """Adds up the durations of operators."""

    def __init__(self, profile: Profile) -> None:
        self._gpu = profile.gpu
        self._total_ns = 0

    def take(self) -> int:
        """The sum since the last call."""
        total, self._total_ns = self._total_ns, 0
        return total

    def add(self, duration_ns: int) -> None:
        """One more kernel."""
        self._total_ns += duration_ns

    def mode(self) -> Any:
        """A context in which operators are priced."""
        import contextlib

        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        pricing = self

        class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = function(*args, **(kwargs or {}))
                pricing.add(pricing.operator_ns(function, args, kwargs or {}, result))
                return result

        class _Function(TorchFunctionMode):
            def __torch_function__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                import torch.nn.functional as F

                if function is F.scaled_dot_product_attention:
                    return _fused_attention(pricing, *args, **(kwargs or {}))
                return function(*args, **(kwargs or {}))

        @contextlib.contextmanager
        def both() -> Any:
            with _Function(), _Dispatch():  # type: ignore[no-untyped-call]
                yield

        return both()

    def operator_ns(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> int:
        """Duration of one aten operator."""
        if function.is_view or function.overloadpacket.__name__ in _FREE:
            return 0
        priced = _PRODUCTS.get(function.overloadpacket.__name__)
        if priced is not None:
            return priced(self._gpu, args, result)
        tensors = _distinct([*args, *kwargs.values()])
        outputs = _distinct([result])
        # An in-place operand is among both: it is read and written.
        size_bytes = sum(_moved_bytes(t) for t in tensors) + sum(_moved_bytes(t) for t in outputs)
        return costs.bytes_bound_ns(self._gpu, size_bytes) if size_bytes else 0

    def attention(self, shape: costs.AttentionShape, which: costs.Pass, dtype: Any) -> None:
        """One pass of fused attention."""
        self.add(costs.attention_ns(self._gpu, shape, which, _dtype(dtype)))


#: Operators that launch no kernel.
_FREE = frozenset({"empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "new_empty"})


def _distinct(values: Sequence[Any]) -> list[torch.Tensor]:
    import torch

    found: dict[int, torch.Tensor] = {}
    for value in values:
        items = value if isinstance(value, tuple | list) else [value]
        for item in items:
            if isinstance(item, torch.Tensor):
                found[id(item)] = item
    return list(found.values())


def _moved_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are in memory: a broadcast dimension is there once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _dtype(dtype: Any) -> costs.DType:
    import torch

    names: dict[Any, costs.DType] = {
        torch.float64: "fp64",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
    }
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return names.get(dtype, "tf32" if tf32 else "fp32")


def _product(left: int, right: int) -> Callable[[Any, Sequence[Any], Any], int]:
    """Price a product whose operands are the arguments ``left`` and ``right``."""

    def price(gpu: Any, args: Sequence[Any], result: Any) -> int:
        a, b = args[left], args[right]
        shape = costs.MatmulShape(
            m=a.shape[-2], k=a.shape[-1], n=b.shape[-1], batch=math.prod(a.shape[:-2])
        )
        return costs.matmul_ns(gpu, shape, _dtype(a.dtype))

    return price


def _convolution_shape(x: Any, weight: Any, args: Sequence[Any]) -> costs.ConvolutionShape:
    """``args`` are stride, padding, dilation, transposed, output padding and groups."""
    stride, padding, _, transposed, _, groups = args[:6]
    if transposed or x.dim() != 4:
        raise ConfigError(
            "the cost model has 2-d convolutions only; a transposed or other one is in the module"
        )
    return costs.ConvolutionShape(
        n=x.shape[0],
        channels=x.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        filters=weight.shape[0],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(stride[0], stride[-1]),
        padding=(padding[0], padding[-1]),
        groups=groups,
    )


def _convolution(gpu: Any, args: Sequence[Any], result: Any) -> int:
    shape = _convolution_shape(args[0], args[1], args[3:])
    return costs.convolution_ns(gpu, shape, "forward", _dtype(args[0].dtype))


def _convolution_backward(gpu: Any, args: Sequence[Any], result: Any) -> int:
    shape = _convolution_shape(args[1], args[2], args[4:])
    dtype, needs = _dtype(args[1].dtype), args[10]
    duration = costs.convolution_ns(gpu, shape, "input_gradient", dtype) if needs[0] else 0
    if needs[1]:
        duration += costs.convolution_ns(gpu, shape, "weight_gradient", dtype)
    if needs[2]:
        duration += costs.bytes_bound_ns(gpu, _moved_bytes(args[0]))
    return duration


_PRODUCTS: dict[str, Callable[[Any, Sequence[Any], Any], int]] = {
    "mm": _product(0, 1),
    "bmm": _product(0, 1),
    "addmm": _product(1, 2),
    "baddbmm": _product(1, 2),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}


def _fused_attention(
    pricing: _Pricing,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """What ``scaled_dot_product_attention`` saves and returns, priced as the fused kernel."""
    import torch

    shape = costs.AttentionShape(
        batch=math.prod(query.shape[:-3]),
        heads=query.shape[-3],
        kv_heads=key.shape[-3],
        queries=query.shape[-2],
        keys=key.shape[-2],
        head_dim=query.shape[-1],
        causal=is_causal,
    )

    class _Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = q.new_empty((*q.shape[:-1], v.shape[-1]))
            sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, out, sums)
            pricing.attention(shape, "forward", q.dtype)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            q, k, v, _, _ = ctx.saved_tensors
            pricing.attention(shape, "backward", q.dtype)
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    result: torch.Tensor = _Attention.apply(query, key, value)
    return result
