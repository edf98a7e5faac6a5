"""Random programs with a gradient off the device do what they do with one on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from spillover.optim import clip_grad_norm_, offload_gradients, pending_gradient

Step = Callable[[nn.Parameter, float], object]


def backward(parameter: nn.Parameter, number: float) -> None:
    ramp = torch.arange(parameter.numel(), device="cuda", dtype=parameter.dtype)
    (parameter * (ramp * number).view_as(parameter)).sum().backward()


def set_to_none(parameter: nn.Parameter, number: float) -> None:
    parameter.grad = None


def assign(parameter: nn.Parameter, number: float) -> None:
    parameter.grad = torch.full_like(parameter, number)


def of_gradient(change: Callable[[torch.Tensor, float], object]) -> Step:
    def step(parameter: nn.Parameter, number: float) -> object:
        return None if parameter.grad is None else change(parameter.grad, number)

    return step


STEPS: dict[str, Step] = {
    "backward": backward,
    "set_to_none": set_to_none,
    "assign": assign,
    "zero_": of_gradient(lambda g, number: g.zero_()),
    "mul_": of_gradient(lambda g, number: g.mul_(number)),
    "div_": of_gradient(lambda g, number: g.div_(number)),
    "clamp_": of_gradient(lambda g, number: g.clamp_(-abs(number), 1.0)),
    "add_": of_gradient(lambda g, number: g.add_(torch.full_like(g, number))),
    "add_ a number": of_gradient(lambda g, number: g.add_(number)),
    "copy_": of_gradient(lambda g, number: g.copy_(torch.full_like(g, number))),
    "neg_": of_gradient(lambda g, number: g.neg_()),
    "view": of_gradient(lambda g, number: g.view(-1)[:1].mul_(number)),
    "data": of_gradient(lambda g, number: g.data.mul_(number)),
    "read": of_gradient(lambda g, number: (g * number).sum()),
    "norm": of_gradient(lambda g, number: g.norm()),
    "max": of_gradient(lambda g, number: g.norm(float("inf"))),
    "finite": of_gradient(lambda g, number: torch.isnan(g).any() | torch.isinf(g).any()),
    "cpu": of_gradient(lambda g, number: g.cpu()),
}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def run(program: list[tuple[str, float]], count: int) -> None:
    plain, offloaded = (nn.Parameter(torch.ones(count, 2, device="cuda")) for _ in range(2))
    with offload_gradients([offloaded]):
        for name, number in program:
            if name == "clip":
                expected = nn.utils.clip_grad_norm_([plain], abs(number))
                assert_same(clip_grad_norm_([offloaded], abs(number)).cpu(), expected.cpu())
            elif name == "lease":
                pending = pending_gradient(offloaded)
                if pending is None:
                    continue
                value = plain.grad.clone()
                # Neither must what follows change it, nor it what follows.
                for parameter in (plain, offloaded):
                    backward(parameter, number)
                pending.wait()
                assert_same(pending.flat.float() * pending.factor, value.flatten().cpu())
                pending.release()
            else:
                found, expected = (STEPS[name](one, number) for one in (offloaded, plain))
                if isinstance(expected, torch.Tensor):
                    assert_same(found.clone(), expected.clone())
        assert (offloaded.grad is None) == (plain.grad is None)
        if plain.grad is not None:
            assert_same(offloaded.grad.cpu(), plain.grad.cpu())


PROGRAMS = st.lists(
    st.tuples(
        st.sampled_from([*STEPS, "clip", "lease", "backward", "backward"]),
        st.sampled_from([0.5, -2.0, 3.0, 0.125]),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS, count=st.sampled_from([1, 150]))
def test_random_programs(program: list[tuple[str, float]], count: int) -> None:
    run(program, count)


@pytest.mark.soak
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=PROGRAMS, count=st.sampled_from([1, 2, 150, 40_000]))
def test_many_random_programs(program: list[tuple[str, float]], count: int) -> None:
    run(program, count)
