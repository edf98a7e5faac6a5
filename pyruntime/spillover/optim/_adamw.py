"""AdamW with its state in host memory and its step on the CPU.

Note [What the host holds]
--------------------------
For each parameter: fp32 moments, and for bf16 and fp16 weights an fp32 master. A float32 weight on
the device has no master: it comes to the host with its gradient and goes back changed, which costs
link traffic and saves four bytes a parameter. A float32 weight on the host (streamed blocks) is
updated where it lies.

A master can fall behind the weight when something else writes the weight: a checkpoint loaded
after the optimizer was made, a re-initialised layer. The weight's version counter after our own
write is remembered; when it differs at the next step, the weight is compared with the rounded
master, element by element, and the master takes over those that differ. So a resumed run keeps the
low bits of its masters whichever of the two checkpoints was loaded first. A write through
``weight.data`` does not move the counter and is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spillover._errors import ConfigError
from spillover._layout import dense_stride, flat_view
from spillover._pinned import empty_pinned
from spillover._settings import enabled
from spillover._stalls import Stall, Timed
from spillover.optim._adamw_work import Work, batches, check_parameter, is_plain, update
from spillover.optim._gradient_placeholder import pending_gradient
from spillover.optim._gradients import Anomalies, OffloadedGradients, offload_gradients
from spillover.optim._staging import Piece, Slot, Staging, piece_bytes, staging_of

# Elements of a low-precision host weight that are updated at a time: their float32 gradients are a
# temporary that should not grow with the weight.
_SCRATCH_ELEMENTS_MAX = 4 << 20

_STEP = Timed("optimizer", "step")
_ARRIVAL = Stall("optimizer", "gradients to arrive")
_OTHER_STEP = Stall("optimizer", "another optimizer's step")


@dataclass(frozen=True, eq=False)
class _Kept:
    """Hides a state tensor from torch's load_state_dict, which would cast it like the weight."""

    tensor: torch.Tensor


_TORCH_GROUP_OPTIONS: dict[str, Any] = {
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) as in ``torch.optim.AdamW``, with state on the host.

    The state is float32 in pinned host memory. ``step()`` brings gradients to the host, updates
    with torch's fused CPU kernel, and sends new weights back; it blocks the host until the last
    gradient has arrived and been applied. Kernels launched on the current stream after ``step()``
    see the new weights. Gradients may be freed or changed when it returns. Pinned staging is at
    most 64 MiB a device.

    Parameters
    ----------
    params
        Parameters or groups of them: float32, bfloat16 or float16, on CUDA devices or on the host
        (as the weights that :func:`spillover.stream_parameters` streams), mixed as they come.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As in ``torch.optim.AdamW``.
    tier
        Where the state lives; ``"host"``.
    offload_gradients
        Gradients leave the device as backward makes them, by :func:`offload_gradients` with its
        defaults, and ``.grad`` is a placeholder. Gradients that the caller has offloaded with other
        options are taken as well.
    gradient_anomalies
        What ``step()`` does about gradients with NaN or infinity that were offloaded: ``"raise"``
        :class:`NonFiniteGradient` before anything changes, ``"warn"``, or nothing.

    Raises
    ------
    ConfigError
        An option is out of range, or a parameter is of another type or has gaps in memory.

    Notes
    -----
    LR schedulers, ``add_param_group`` and closures work as usual. GradScaler works through
    ``unscale_``, which ``scaler.step`` calls by itself. ``state_dict()`` has torch's format and can
    be exchanged with ``torch.optim.AdamW`` both ways; masters of low-precision weights are under
    the additional key ``"master"``, and start from the weight where a checkpoint has none.

    With ``SPILLOVER=0`` the constructor returns a ``torch.optim.AdamW``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give torch's own optimizer when Spillover is switched off."""
        if cls is AdamW and not enabled():
            kwargs.pop("tier", None)
            kwargs.pop("offload_gradients", None)
            kwargs.pop("gradient_anomalies", None)
            return torch.optim.AdamW(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        tier: Literal["host"] = "host",
        offload_gradients: bool = False,
        gradient_anomalies: Anomalies | None = None,
    ) -> None:
        _check_tier(tier)
        # The keys after maximize are those of torch.optim.AdamW, so that it can load our groups.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            **_TORCH_GROUP_OPTIONS,
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        if gradient_anomalies is not None and not offload_gradients:
            raise ConfigError("gradient_anomalies needs offload_gradients=True")
        if offload_gradients:
            self._offload_gradients(gradient_anomalies)

    @property
    def gradients(self) -> OffloadedGradients | None:
        """The handle of gradients off the device; None unless ``offload_gradients`` was set."""
        found: OffloadedGradients | None = self.__dict__.get("_gradients")
        return found

    def _offload_gradients(self, anomalies: Anomalies | None) -> None:
        named = _named(self.param_groups)
        self._gradients = offload_gradients(named, anomalies=anomalies)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose gradients are offloaded where ours are."""
        state: dict[str, Any] = super().__getstate__()
        if self.gradients is not None:
            state["gradient_anomalies"] = self.gradients.anomalies
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see the class for what they and their options may be."""
        _check_options(param_group)
        params = param_group.get("params", ())
        if not isinstance(params, torch.Tensor):
            params = list(params)
            param_group["params"] = params
        for entry in [params] if isinstance(params, torch.Tensor) else params:
            tensor = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(tensor, torch.Tensor):
                check_parameter(tensor)
        super().add_param_group(param_group)
        if self.gradients is not None:
            try:
                self.gradients.add(_named(self.param_groups))
            except BaseException:
                del self.param_groups[-1]
                raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or unpickled state, in float32 pinned memory."""
        is_offloaded = "gradient_anomalies" in state
        anomalies = state.pop("gradient_anomalies", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in (("amsgrad", False), ("maximize", False)):
                group.setdefault(key, value)
            for key, option in _TORCH_GROUP_OPTIONS.items():
                group.setdefault(key, option)
            # A checkpoint of torch's Adam says otherwise; torch's AdamW takes it over so, too.
            group["decoupled_weight_decay"] = True
        for parameter, entry in self.state.items():
            if isinstance(parameter, torch.Tensor):
                for name, value in list(entry.items()):
                    entry[name] = _place(name, value, parameter)
        if is_offloaded:
            self._offload_gradients(anomalies)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of ``torch.optim.AdamW``; moments are kept in float32."""

        def hide(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            hidden = {
                key: {
                    name: _Kept(value) if isinstance(value, torch.Tensor) else value
                    for name, value in entry.items()
                }
                for key, entry in loaded["state"].items()
            }
            return {**loaded, "state": hidden}

        # Registered last, so that it runs after the hooks of users, which see the tensors.
        hook = self.register_load_state_dict_pre_hook(hide)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Parameters
        ----------
        closure
            Computes the loss again and returns it, as for torch's optimizers.

        Raises
        ------
        ConfigError
            A gradient is sparse; nothing has been changed then.
        HostOutOfMemory
            There is no memory for the state or for staging; no weight, moment or step count has
            been changed then.
        RuntimeError
            A CUDA call failed on the way. Some weights are updated then and others are not, so a
            repeated step would update those twice: go on from a checkpoint.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _STEP.call(self._step)
        return loss

    def _step(self) -> None:
        if self.gradients is not None:
            # Some may require gradients only now; their next ones leave.
            self.gradients.add(_named(self.param_groups))
            self.gradients.check()
        groups: list[list[Work]] = []
        try:
            for group in self.param_groups:
                groups.append([])
                for parameter in group["params"]:
                    groups[-1] += self._prepare(parameter, group)
            self._update_groups(groups)
        finally:
            for works in groups:
                for work in works:
                    if work.pending is not None:
                        work.pending.release()
            if self.gradients is not None:
                self.gradients.collect()

    def _update_groups(self, groups: list[list[Work]]) -> None:
        steps = [work.state["step"] for works in groups for work in works]
        if not steps:
            return
        by_device = _by_device(groups)
        with contextlib.ExitStack() as held:
            # All memory is there before anything changes, so that a step that fails for want of
            # it can be repeated. Every step takes the locks in one order.
            for device in sorted(by_device, key=str):
                staging = staging_of(device)
                if not staging.lock.acquire(blocking=False):
                    _OTHER_STEP.wait(staging.lock.acquire)
                held.callback(staging.lock.release)
                staging.reserve(_wanted_bytes(by_device[device]))
            torch._foreach_add_(steps, 1)
            for device, device_groups in by_device.items():
                with torch.cuda.device(device):
                    self._run_pipeline(staging_of(device), device_groups)
        for works in groups:
            self._update_host([work for work in works if work.parameter.device.type == "cpu"])
        for works in groups:
            for work in works:
                if "master" in work.state:
                    self._versions[work.parameter] = _identity(work.parameter)

    # ---- state ---------------------------------------------------------------------------------

    @property
    def _versions(self) -> dict[torch.Tensor, tuple[int, int]]:
        """Version counters of weights after our last write; see Note [What the host holds]."""
        found: dict[torch.Tensor, tuple[int, int]] = self.__dict__.setdefault("_written", {})
        return found

    def _prepare(self, parameter: torch.Tensor, group: dict[str, Any]) -> Iterator[Work]:
        gradient = parameter.grad
        if gradient is None or parameter.numel() == 0:
            return
        if gradient.layout is not torch.strided:
            raise ConfigError(
                f"AdamW does not take {gradient.layout} gradients (parameter of shape "
                f"{tuple(parameter.shape)}); use sparse=False in the embedding"
            )
        # Moved or converted since it was added, perhaps.
        check_parameter(parameter)
        found = self.state.get(parameter, {})
        # Entered only when it is complete: where memory runs out on the way, a checkpoint must not
        # hold half of it.
        fresh: dict[str, Any] = {}
        if "step" not in found:
            fresh["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
        for name in names:
            if name not in found:
                fresh[name] = _empty_state(parameter).zero_()
        if parameter.dtype != torch.float32:
            if "master" in found:
                self._refresh_master(parameter, found["master"])
            else:
                fresh["master"] = _empty_state(parameter).copy_(parameter)
        state = self.state[parameter]
        state.update(fresh)
        pending = pending_gradient(parameter)
        if pending is not None:
            yield Work(parameter, pending.flat, state, group, pending)
            return
        if tuple(gradient.stride()) != tuple(parameter.stride()):
            gradient = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
            ).copy_(gradient)
        yield Work(parameter, gradient, state, group)

    def _refresh_master(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        if self._versions.get(parameter) == _identity(parameter):
            return
        weight = parameter.to("cpu")
        torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)

    # ---- updates -------------------------------------------------------------------------------

    def _update_host(self, works: list[Work]) -> None:
        """Update weights that lie on the host."""
        full = [work for work in works if is_plain(work)]
        if full:
            update(
                full[0].group,
                [(work, 0, work.parameter.numel()) for work in full],
                [flat_view(work.parameter) for work in full],
                [flat_view(work.gradient) for work in full],
            )
        for work in works:
            if not is_plain(work):
                self._update_host_low_precision(work)

    def _update_host_low_precision(self, work: Work) -> None:
        weight, gradient = flat_view(work.parameter), flat_view(work.gradient)
        for start in range(0, weight.numel(), _SCRATCH_ELEMENTS_MAX):
            count = min(_SCRATCH_ELEMENTS_MAX, weight.numel() - start)
            target = work.of_state("master", start, count) if "master" in work.state else None
            part = weight[start : start + count]
            update(
                work.group,
                [(work, start, count)],
                [part if target is None else target],
                [gradient[start : start + count].float()],
            )
            if target is not None:
                part.copy_(target)

    def _run_pipeline(self, staging: Staging, groups: list[list[Work]]) -> None:
        """Update weights that lie on one CUDA device. See Note [Optimizer pipeline]."""
        compute = torch.cuda.current_stream(staging.device)
        staging.streams.copy_out.wait_stream(compute)
        try:
            self._run_batches(staging, groups)
        except BaseException:
            # The caller may free gradients and weights now, so nothing may copy them any more.
            staging.drain()
            raise
        finally:
            compute.wait_stream(staging.streams.copy_in)

    def _run_batches(self, staging: Staging, groups: list[list[Work]]) -> None:
        waiting: tuple[Slot, list[tuple[Work, Piece]]] | None = None
        for batch in batches(groups, staging.slot_bytes):
            slot = staging.next_slot()
            staging.start_arrival(slot, [piece for _, piece in batch])
            if waiting is not None:
                self._update_batch(staging, *waiting)
            waiting = (slot, batch)
        if waiting is not None:
            self._update_batch(staging, *waiting)

    def _update_batch(self, staging: Staging, slot: Slot, batch: list[tuple[Work, Piece]]) -> None:
        _ARRIVAL.wait(slot.arrived.synchronize)
        weights = []
        gradients = []
        targets = []
        for work, piece in batch:
            weight = slot.view(piece.weight_offset, piece.count, piece.weight.dtype)
            if work.pending is not None:
                work.pending.wait()
                gradients.append(work.gradient_of_host(piece.start, piece.count))
            else:
                gradient = slot.view(piece.gradient_offset, piece.count, piece.gradient.dtype)
                gradients.append(gradient.float())
            targets.append(weight)
            weights.append(
                weight if piece.reads_weight else work.of_state("master", piece.start, piece.count)
            )
        ranges = [(work, piece.start, piece.count) for work, piece in batch]
        update(batch[0][0].group, ranges, weights, gradients)
        for target, weight in zip(targets, weights, strict=True):
            if target is not weight:
                target.copy_(weight)
        staging.start_departure(slot, [piece for _, piece in batch])


def _by_device(groups: list[list[Work]]) -> dict[torch.device, list[list[Work]]]:
    """The work on CUDA devices, by device; still one list a parameter group."""
    found: dict[torch.device, list[list[Work]]] = {}
    for works in groups:
        for device in dict.fromkeys(work.parameter.device for work in works):
            if device.type == "cuda":
                chosen = [work for work in works if work.parameter.device == device]
                found.setdefault(device, []).append(chosen)
    return found


def _wanted_bytes(groups: list[list[Work]]) -> int:
    return sum(piece_bytes(work.parameter, work.gradient) for works in groups for work in works)


def _named(groups: list[dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """All parameters, by their names where the optimizer was given them."""
    return [
        (group["param_names"][index] if "param_names" in group else f"{number}.{index}", parameter)
        for number, group in enumerate(groups)
        for index, parameter in enumerate(group["params"])
    ]


def _identity(parameter: torch.Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def _empty_state(parameter: torch.Tensor) -> torch.Tensor:
    """Uninitialised fp32 host memory in the parameter's own element order."""
    if torch.cuda.is_available():
        flat = empty_pinned((parameter.numel(),), torch.float32)
    else:
        flat = torch.empty(parameter.numel(), dtype=torch.float32, device="cpu")
    state: torch.Tensor = flat.as_strided(parameter.shape, dense_stride(parameter))
    return state


def _place(name: str, value: Any, parameter: torch.Tensor) -> Any:
    tensor = value.tensor if isinstance(value, _Kept) else value
    if name == "step":
        step = torch.as_tensor(tensor, dtype=torch.float32, device="cpu").detach()
        return step.clone().reshape(())
    if not isinstance(tensor, torch.Tensor) or tensor.shape != parameter.shape:
        return tensor
    return _empty_state(parameter).copy_(tensor)


def _check_options(options: dict[str, Any]) -> None:
    """Check the options that are given for one group, or for all of them."""
    for name in ("lr", "eps", "weight_decay"):
        if name in options:
            _check_not_negative(name, options[name])
    if "betas" in options:
        _check_betas(options["betas"])
    for name in ("capturable", "differentiable"):
        if options.get(name):
            raise ConfigError(f"{name}=True is not supported: the step runs on the host")


def _check_not_negative(name: str, value: Any) -> None:
    try:
        number = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    # Written so that NaN, which compares false with everything, is refused.
    if not number >= 0.0:
        raise ConfigError(f"{name} must be a number of 0 or more, got {value!r}")


def _check_betas(betas: Any) -> None:
    try:
        first, second = betas
        fits = 0.0 <= first < 1.0 and 0.0 <= second < 1.0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(
            f"betas must be two numbers in [0, 1), such as (0.9, 0.999), got {betas!r}"
        )


def _check_tier(tier: str) -> None:
    if tier == "device":
        raise ConfigError("tier='device' is what torch.optim.AdamW does; here tier is 'host'")
    if tier != "host":
        raise ConfigError(f"tier={tier!r} is not known; it must be 'host'")
