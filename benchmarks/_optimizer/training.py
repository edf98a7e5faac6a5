"""Trains a small GPT with our optimizers and with torch's, for ``benchmarks._optimizer.equality``.

In bfloat16, with accumulation, clipping and a cosine schedule. On recorded gradients the
physical limit is torch in float64, which gets the same micro-steps; in a closed loop, where each
run makes its own gradients, it is how far torch's own two implementations come apart.

``WAYS`` are the options of ours whose results may not differ by a bit.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import spillover

STEPS = 200
#: Options of ours, for a model and a folder; with each the weights and state must be those of the
#: first, which is compared with float64, to the last bit.
WAYS: dict[str, Callable[[nn.Module, Path], dict[str, Any]]] = {
    "host": lambda model, folder: {},
    "repeated": lambda model, folder: {},
    "disk": lambda model, folder: {"tier": "disk", "directory": folder},
    "overlap": lambda model, folder: {"overlap": model},
}

MICRO_STEPS, _CLIP, _LR = 2, 0.5, 3e-3
CHECKED_EVERY = 10
_VOCABULARY, _WIDTH, _LENGTH, _ROWS = 61, 32, 12, 4
#: torch's classes, and options; the quick form has the first.
CLASSES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": _LR, "weight_decay": 0.1},
    "Adam": {"lr": _LR, "weight_decay": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adagrad": {"lr": 1e-2},
}

Optimizer = torch.optim.Optimizer
#: Of a step, the gradients of each micro-step.
Recording = list[list[list[torch.Tensor]]]


# ---- the model ---------------------------------------------------------------------------------


class _Gpt(nn.Module):
    """Embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.block = nn.TransformerEncoderLayer(
            _WIDTH, 4, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(_WIDTH, _VOCABULARY)
        self.head.weight = self.embedding.weight

    def loss(self, seed: int) -> torch.Tensor:
        """Of a batch that the seed makes."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, _VOCABULARY, (_ROWS, 1), generator=generator)
        stride = torch.randint(1, 4, (_ROWS, 1), generator=generator)
        tokens = ((first + stride * torch.arange(_LENGTH + 1)) % _VOCABULARY).cuda()
        embedded = self.embedding(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(_LENGTH, device="cuda")
        hidden = self.block(embedded, src_mask=mask.to(embedded.dtype), is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())


def _make_model(dtype: torch.dtype, seed: int = 0) -> _Gpt:
    torch.manual_seed(seed)
    return _Gpt().to("cuda", dtype)


def _schedule(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=_LR / 10)


# ---- recorded gradients ------------------------------------------------------------------------


def _record() -> Recording:
    """The micro-steps of a training with torch."""
    model = _make_model(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_LR)
    schedule = _schedule(optimizer)
    recording: Recording = []
    for step in range(STEPS):
        recording.append([])
        for micro_step in range(MICRO_STEPS):
            loss = model.loss(step * MICRO_STEPS + micro_step) / MICRO_STEPS
            gradients = torch.autograd.grad(loss, parameters)
            recording[-1].append([gradient.cpu() for gradient in gradients])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return recording


def _replay(
    parameters: list[torch.Tensor],
    optimizer: Optimizer,
    clip: Callable[..., object],
    recording: Recording,
) -> Iterator[int]:
    """Take the recorded steps; yields before each step's update and after the last one."""
    schedule = _schedule(optimizer)
    for step, micro_steps in enumerate(recording):
        for gradients in micro_steps:
            arrived = [
                gradient.to(parameter.device, parameter.dtype)
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ]
            torch.autograd.backward(parameters, arrived)
        clip(parameters, _CLIP)
        yield step
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    yield len(recording)


def _in_float64(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [nn.Parameter(weight.detach().double().cpu()) for weight in weights]


def _masters(optimizer: Optimizer) -> list[torch.Tensor]:
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    return [state[index]["master"] for index in sorted(state)]


def _error(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Of all together."""
    differences, norms = [], []
    for one, other in zip(found, expected, strict=True):
        differences.append((one.detach().cpu().double() - other.detach().cpu().double()).norm())
        norms.append(other.detach().cpu().double().norm())
    return float(torch.stack(differences).norm() / torch.stack(norms).norm())


class _Follower:
    """Takes single steps in float64 from where ours is, with the same gradients."""

    def __init__(self, name: str, optimizer: Optimizer, parameters: list[torch.Tensor]) -> None:
        self._name = name
        self._ours = optimizer
        self._parameters = parameters
        self._expected: Optimizer | None = None
        self.error = 0.0

    def before(self, micro_steps: list[list[torch.Tensor]]) -> None:
        """Take a step from the state before ours."""
        from_start = not self._ours.state_dict()["state"]
        weights = _in_float64(self._parameters if from_start else _masters(self._ours))
        expected = getattr(torch.optim, self._name)(weights)
        # torch takes step counts over as they are, and would count ours.
        expected.load_state_dict(copy.deepcopy(self._ours.state_dict()))
        for weight, *gradients in zip(weights, *micro_steps, strict=True):
            weight.grad = torch.stack([gradient.double() for gradient in gradients]).sum(0)
        nn.utils.clip_grad_norm_(weights, _CLIP)
        expected.step()
        self._expected = expected

    def after(self) -> None:
        """Compare ours with it."""
        if self._expected is None:
            return
        expected, self._expected = self._expected, None
        found = self._ours.state_dict()["state"]
        for index, entry in expected.state_dict()["state"].items():
            weight = expected.param_groups[0]["params"][index]
            pairs = [(found[index]["master"], weight)]
            pairs += [
                (found[index][key], value)
                for key, value in entry.items()
                if key not in ("master", "step") and value is not None
            ]
            self.error = max(self.error, *(_error([a], [b]) for a, b in pairs))


def recorded(classes: int) -> dict[str, float]:
    """Errors on recorded gradients, of so many classes."""
    recording = _record()
    one_step, end = 0.0, 0.0
    equal = dict.fromkeys(list(WAYS)[1:], 1.0)
    for name, options in list(CLASSES.items())[:classes]:
        expected = _in_float64(_make_model(torch.bfloat16).parameters())
        reference = getattr(torch.optim, name)(expected, **options)
        for _ in _replay(expected, reference, nn.utils.clip_grad_norm_, recording):
            pass
        ends: list[list[torch.Tensor]] = []
        for way in WAYS.values():
            found, follower = _ours(name, options, way, recording, follows=not ends)
            if not ends:
                end = max(end, _error(found[: len(expected)], expected))
                one_step = max(one_step, follower.error)
            ends.append(found)
        for way, other in zip(equal, ends[1:], strict=True):
            equal[way] *= float(all(map(torch.equal, ends[0], other)))
    return {
        "equality_one_step_error": one_step,
        "equality_200_steps_error": end,
        **{f"equality_bitwise.{way}": value for way, value in equal.items()},
    }


def _ours(
    name: str, options: dict[str, Any], way: Any, recording: Recording, *, follows: bool
) -> tuple[list[torch.Tensor], _Follower]:
    """Masters, then weights and all state, after the recorded steps."""
    model = _make_model(torch.bfloat16)
    parameters: list[torch.Tensor] = list(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        optimizer = getattr(spillover.optim, name)(
            parameters, offload_gradients=True, **options, **way(model, Path(folder))
        )
        follower = _Follower(name, optimizer, parameters)
        for step in _replay(parameters, optimizer, spillover.optim.clip_grad_norm_, recording):
            follower.after()
            if follows and step % CHECKED_EVERY == 0 and step < len(recording):
                follower.before(recording[step])
        state = optimizer.state_dict()["state"]
        arrays = [torch.as_tensor(v) for entry in state.values() for v in entry.values()]
        found = [*_masters(optimizer), *parameters, *arrays]
        return [each.detach().cpu().clone() for each in found], follower


# ---- the closed loop ---------------------------------------------------------------------------


class _CudaFusedAdamW(torch.optim.Optimizer):
    """The arithmetic of torch's fused kernel for CUDA: constants in double, results in float32.

    On an emulated device the fused kernel is the CPU's, which rounds as foreach does.
    """

    def __init__(self, params: Any, **options: float) -> None:
        super().__init__(params, {"betas": (0.9, 0.999), "eps": 1e-8, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(step=0, first=torch.zeros_like(weight))
                    state["second"] = torch.zeros_like(weight)
                state["step"] += 1
                first, second, gradient = state["first"], state["second"], weight.grad.double()
                weight.copy_(weight.double() * (1 - lr * group["weight_decay"]))
                first.copy_(beta1 * first.double() + (1 - beta1) * gradient)
                second.copy_(beta2 * second.double() + (1 - beta2) * gradient * gradient)
                root = second.sqrt() / math.sqrt(1 - beta2 ** state["step"])
                denominator = (root.double() + group["eps"]).float()
                weight.sub_(first * (lr / (1 - beta1 ** state["step"])) / denominator)


def _closed_loop(make: Callable[[Iterable[nn.Parameter]], Optimizer], seed: int) -> list[Any]:
    """Weights of a training in which each step's gradients depend on those before."""
    model = _make_model(torch.float32, seed)
    optimizer = make(model.parameters())
    schedule = _schedule(optimizer)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.loss((seed * STEPS + step) * MICRO_STEPS + micro_step)
            (loss / MICRO_STEPS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return list(model.parameters())


def distances(seeds: int) -> dict[str, float]:
    """How far closed loops end from that of torch's foreach implementation."""
    options = CLASSES["AdamW"]
    ways: dict[str, Callable[[Any], Optimizer]] = {
        "ours": lambda params: spillover.optim.AdamW(params, **options),
        "torch_fused": lambda params: torch.optim.AdamW(params, fused=True, **options),
        "torch_fused_cuda": lambda params: _CudaFusedAdamW(params, **options),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        expected = _closed_loop(lambda p: torch.optim.AdamW(p, foreach=True, **options), seed)
        for name, make in ways.items():
            found[name].append(_error(_closed_loop(make, seed), expected))
    return {f"closed_loop_distance.{name}": statistics.median(all_) for name, all_ in found.items()}
