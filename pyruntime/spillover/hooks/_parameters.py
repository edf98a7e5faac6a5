"""Weights of repeated blocks in pinned host memory, fetched to the device when they are needed.

``stream_parameters`` is the public entry. Selection of blocks is in ``_parameters_select``, one
block's memory in ``_parameters_block``, the order of work in ``_parameters_engine`` (see its Note
[Streamed weights] for the design), gradients in ``_parameters_gradients``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from spillover._errors import ConfigError, StateError
from spillover._settings import enabled, logger
from spillover._sources import register
from spillover._units import format_bytes
from spillover.hooks import _parameters_scaler
from spillover.hooks._parameters_block import StreamedBlock, build_block
from spillover.hooks._parameters_engine import WeightStreamer
from spillover.hooks._parameters_select import (
    choose_resident,
    find_blocks,
    streamed_parameters,
)

_ATTRIBUTE = "_spillover_streamed_parameters"


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """What a model's streamed weights take and cost.

    Attributes
    ----------
    blocks_streamed, blocks_resident
        How many blocks live on the host and on the device.
    streamed_bytes
        Pinned host memory that holds the streamed weights.
    resident_bytes
        Weights that stay on the device: resident blocks and everything outside of blocks. After
        ``remove()`` nothing is streamed or resident any more.
    device_bytes
        Streamed weights that are on the device now.
    fetched_bytes, fetches
        Copied from host to device since the start, and in how many copies.
    waits
        Fetches that were not started ahead, so compute had to wait for the whole copy.
    gradient_bytes
        Gradients copied from device to host since the start.
    """

    blocks_streamed: int
    blocks_resident: int
    streamed_bytes: int
    resident_bytes: int
    device_bytes: int
    fetched_bytes: int
    fetches: int
    waits: int
    gradient_bytes: int


class StreamedParameters:
    """Handle of a model whose weights are streamed; made by :func:`stream_parameters`.

    As a context manager it ends the streaming when the block is left.
    """

    def __init__(self, model: nn.Module, streamer: WeightStreamer | None, resident: int) -> None:
        self._model = model
        self._streamer = streamer
        self._blocks_resident = resident
        self._undo: list[Callable[[], Any]] = []
        if streamer is not None:
            register("weights", self, _read_stats)

    @property
    def stats(self) -> StreamStats:
        """Figures of this moment; cheap, and does not wait for the device."""
        streamer = self._streamer
        blocks = streamer.blocks if streamer is not None else []
        removed = streamer is not None and streamer.closed
        streamed = {id(weight.parameter) for block in blocks for weight in block.weights}
        return StreamStats(
            blocks_streamed=len(blocks),
            blocks_resident=0 if removed else self._blocks_resident,
            streamed_bytes=sum(block.size_bytes for block in blocks),
            resident_bytes=sum(
                parameter.nbytes
                for parameter in self._model.parameters()
                if not removed and id(parameter) not in streamed
            ),
            device_bytes=sum(block.size_bytes for block in blocks if block.buffer is not None),
            fetched_bytes=streamer.copies.fetched_bytes if streamer is not None else 0,
            fetches=streamer.copies.fetches if streamer is not None else 0,
            waits=streamer.copies.waits if streamer is not None else 0,
            gradient_bytes=streamer.gradients.copied_bytes if streamer is not None else 0,
        )

    def synchronize(self) -> None:
        """Block the host until no copy reads the weights, so that they may be written.

        Not needed after the model's forward or backward returned, nor before ``optimizer.step()``
        (each of them waits by itself): only if blocks were called one by one, without the model.
        Must not be called while forward runs.
        """
        if self._streamer is not None:
            self._streamer.settle()

    def remove(self) -> None:
        """Make the model ordinary again; blocks the host until copies are complete.

        The Parameter objects stay. Weights of streamed blocks stay in host memory (they may not fit
        on the device) and the others on the device, so a ``model.to(...)`` comes next. A second
        call does nothing.

        Raises
        ------
        StateError
            The model's forward or backward is running.
        """
        if self._streamer is not None and not self._streamer.closed:
            self._streamer.close()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> StreamedParameters:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._streamer is not None:
            # An interrupt may have left a forward that looks as if it were running.
            self._streamer.settle()
        self.remove()


def _read_stats(handle: StreamedParameters) -> StreamStats:
    return handle.stats


class _Bound:
    """A hook or method override that belongs to one module and to no copy of it."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = weakref.ref(module)
        self._call = call

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if module is self._module():
            self._call(*args)
        elif len(args) == 1:
            # Only the hook before forward has one argument; the one after it runs all the same.
            _refuse_copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        return self

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "a model whose weights are streamed cannot be pickled as a whole; save its "
            "state_dict(), or call remove() on the handle first"
        )


class _GuardedApply(_Bound):
    """Stands in for ``block._apply``, which ``to()``, ``cuda()``, ``half()`` and the like call."""

    def __call__(self, function: Callable[..., Any], recurse: bool = True) -> Any:
        return self._call(function, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedApply:
        original = self._module()
        return _GuardedApply(original, _refuse_copy) if original is not None else self


def _refuse_copy(*args: Any) -> NoReturn:
    raise StateError(
        "this module is a copy of one whose weights are streamed; copies hold the weights but are "
        "not streamed themselves. Copy the model before stream_parameters, or after remove()"
    )


def _guarded_apply(
    block: StreamedBlock, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool
) -> nn.Module:
    """Apply ``function`` to all of the block but its streamed weights, which must not change."""
    streamed = {id(weight.parameter): weight for weight in block.weights}
    gradients = {
        id(weight.parameter.grad) for weight in block.weights if weight.parameter.grad is not None
    }

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        weight = streamed.get(id(tensor))
        if weight is None:
            return tensor if id(tensor) in gradients else function(tensor)
        probe = function(torch.empty(0, dtype=tensor.dtype, device=block.device))
        if probe.device != block.device or probe.dtype != tensor.dtype:
            raise StateError(
                f"cannot make weight {weight.name!r} {probe.dtype} on {probe.device} while it is "
                f"streamed as {tensor.dtype} to {block.device}; call remove() on the handle first"
            )
        return tensor

    # The class's own method: the instance's is the guard that called this.
    apply: Callable[..., nn.Module] = type(block.module)._apply
    return apply(block.module, keep, recurse)


def _resolve_device(device: str | torch.device) -> torch.device:
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={device!r} is not a device; give one such as 'cuda' or 'cuda:0': {error}"
        ) from error
    if resolved.type != "cuda":
        raise ConfigError(f"weights are streamed to a CUDA device, not to {str(device)!r}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "stream_parameters needs a CUDA device, and torch sees none; "
            "spillover.emulator gives one to try it on"
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device={str(device)!r} does not exist: torch sees {count} CUDA devices")
    return torch.device("cuda", index)


def _place_outside(model: nn.Module, streamed: set[nn.Parameter], device: torch.device) -> None:
    """Move everything that is not streamed to the device, keeping objects and ties."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter in streamed:
                continue
            # Before anything is assigned: a gradient must not be lost if memory runs out.
            data = parameter.data.to(device)
            gradient = parameter.grad.to(device) if parameter.grad is not None else None
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if buffer not in moved:
                        moved[buffer] = buffer.to(device)
                    module._buffers[name] = moved[buffer]


def stream_parameters(
    model: nn.Module,
    *,
    resident: int | str = 0,
    device: str | torch.device = "cuda",
    blocks: Iterable[nn.Module] | str | None = None,
    prefetch: int = 1,
) -> StreamedParameters:
    """Keep the weights of repeated blocks in pinned host memory and stream them to the device.

    A block's weights are copied to the device before its forward and again before its backward,
    ``prefetch`` blocks ahead on a copy stream, and dropped afterwards. Losses, gradients and
    weights are equal to those of the all-resident run, bit for bit. Everything outside of blocks is
    moved to the device. At most ``resident`` and ``1 + prefetch`` blocks of weights are on the
    device at one time, beside up to one block's gradients on their way out.

    The Parameters of streamed blocks stay the same objects and become pinned CPU tensors:
    optimizers (torch's CPU ones and :class:`spillover.optim.AdamW`), ``clip_grad_norm_``,
    GradScaler, ``state_dict()`` and ``load_state_dict()`` find weights and ``.grad`` there,
    complete when ``backward()`` returns. The model may start on the CPU and be larger than device
    memory.

    Parameters
    ----------
    model
        Called as ``model(...)``; its blocks must be called as modules, too.
    resident
        Blocks that stay on the device: a number of blocks, or bytes as a text such as ``"512MiB"``.
    device
        The CUDA device that computes.
    blocks
        The blocks: a list of modules, or a pattern for their names such as ``"layers.*"``. By
        default the largest ``nn.ModuleList`` or ``nn.Sequential`` of children of one class, and
        others of comparable size (encoder and decoder).
    prefetch
        How many blocks are fetched ahead; 0 fetches each when it is needed.

    Returns
    -------
    StreamedParameters
        ``remove()`` ends the streaming; ``stats`` has the figures. Also a context manager. With
        ``SPILLOVER=0`` the model is moved to the device as a whole and the handle does nothing.

    Raises
    ------
    ConfigError
        No blocks are found, an argument is wrong, or a weight is of a kind that cannot be streamed.
    StateError
        The model's parameters are streamed already. Later, from the model's forward: a streamed
        Parameter was replaced, moved or converted. Call ``remove()`` before such changes. Also from
        the forward or from its optimizer's step: the model's backward runs in another thread.

    Notes
    -----
    A Parameter that several blocks, or a block and the rest of the model, have in common stays on
    the device. Tensor hooks on streamed Parameters raise (post-accumulate hooks run, when the
    gradient is on the host); ``torch.autograd.grad`` with respect to them reports that they are not
    in the graph, and ``backward(create_graph=True)`` raises. A backward that raises leaves out the
    gradients of streamed weights that it had not handed over. Autocast from float32 makes
    low-precision copies of weights that autograd keeps for backward; checkpoint the blocks, or keep
    the weights in low precision, to be rid of them. A weight of a block that is called more than
    once within one autocast region is cast once a call, so there the sum of its gradient may round
    otherwise than without streaming. ``clip_grad_norm_`` and ``get_total_norm`` combine norms
    device by device, so with gradients on the host and on the device the total norm, and what
    follows from clipping by it, may differ in the last bits from the all-resident run. A step of
    the model's optimizer in one thread while forward runs in another only waits for the copies
    under way, as a step inside of forward does: blocks that run later see the new weights, and a
    block that runs at that moment raises StateError when it looks for its weights again. Let
    forward return first.
    """
    if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
        raise ConfigError(f"prefetch must be a number of blocks, 0 or more, not {prefetch!r}")
    if not enabled():
        model.to(device)
        return StreamedParameters(model, None, 0)
    if any(_ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise StateError("the model's parameters are streamed already; call remove() first")
    found = find_blocks(model, blocks)
    chosen = streamed_parameters(model, found)
    sizes = [sum(parameter.nbytes for parameter in chosen[name]) for name in found]
    kept = choose_resident(sizes, resident)
    streamed = [name for index, name in enumerate(found) if index not in kept and sizes[index] > 0]
    target = _resolve_device(device)
    _place_outside(model, {key for name in streamed for key in chosen[name]}, target)
    stand_ins: dict[torch.dtype, torch.Tensor] = {}
    built = [
        build_block(
            index=index,
            name=name,
            module=found[name],
            parameters=chosen[name],
            device=target,
            stand_ins=stand_ins,
        )
        for index, name in enumerate(streamed)
    ]
    streamer = WeightStreamer(target, built, prefetch)
    handle = StreamedParameters(model, streamer, len(found) - len(built))
    _attach(handle, model, streamer)
    stats = handle.stats
    logger.info(
        "streaming %d blocks (%s) from host memory; %d blocks and the rest (%s) stay on %s",
        stats.blocks_streamed,
        format_bytes(stats.streamed_bytes),
        stats.blocks_resident,
        format_bytes(stats.resident_bytes),
        target,
    )
    return handle


def _attach(handle: StreamedParameters, model: nn.Module, streamer: WeightStreamer) -> None:
    undo = handle._undo
    begin = _Bound(model, lambda args: streamer.model_starts())
    end = _Bound(model, lambda args, output: streamer.model_ends())
    undo.append(model.register_forward_pre_hook(begin, prepend=True).remove)
    undo.append(model.register_forward_hook(end, always_call=True).remove)
    for module in (model, *(block.module for block in streamer.blocks)):
        module.__dict__[_ATTRIBUTE] = True
        undo.append(functools.partial(module.__dict__.pop, _ATTRIBUTE, None))
    for block in streamer.blocks:
        undo.extend(_attach_block(streamer, block))
    reference = weakref.ref(streamer)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.host_may_write(optimizer.param_groups)

    # Both are global; a finalizer runs once, by remove() or when the model is dropped without it.
    hook = register_optimizer_step_pre_hook(before_step)
    undo.append(weakref.finalize(streamer, hook.remove))
    undo.append(weakref.finalize(streamer, _parameters_scaler.acquire()))


def _attach_block(streamer: WeightStreamer, block: StreamedBlock) -> list[Callable[[], Any]]:
    module = block.module
    starts = _Bound(module, lambda args: streamer.block_starts(block))
    ends = _Bound(module, lambda args, output: streamer.block_ends(block, output))
    before = module.register_forward_pre_hook(starts, prepend=True)
    after = module.register_forward_hook(ends, always_call=True)
    module.__dict__["_apply"] = _GuardedApply(module, functools.partial(_guarded_apply, block))
    return [before.remove, after.remove, functools.partial(module.__dict__.pop, "_apply", None)]
