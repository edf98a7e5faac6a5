"""Optimizers of other threads and interrupted backwards never lose gradients in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spillover import ConfigError, StateError, stream_parameters


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 1))


def backward_with(model: nn.Module, call: Callable[[], None]) -> list[torch.Tensor]:
    """Gradients of a backward in the middle of which another thread calls ``call``."""

    def interlude(gradient: torch.Tensor) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    hidden: list[torch.Tensor] = []
    hook = model[0][0].register_forward_hook(lambda block, args, output: hidden.append(output))
    loss = model(torch.ones(2, 8, device="cuda")).square().mean()
    hidden[0].register_hook(interlude)
    hook.remove()
    loss.backward()
    return [parameter.grad.clone().cpu() for parameter in model.parameters()]


def test_an_unrelated_optimizer_steps_during_backward() -> None:
    expected = backward_with(make_model().cuda(), lambda: None)
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    model = make_model()
    with stream_parameters(model):
        found = backward_with(model, torch.optim.SGD([other], lr=1.0).step)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(other, -torch.ones(3))


def test_the_model_optimizer_is_refused_during_backward() -> None:
    expected = backward_with(make_model().cuda(), lambda: None)
    model = make_model()
    errors: list[str] = []
    with stream_parameters(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def step() -> None:
            try:
                optimizer.step()
            except StateError as error:
                errors.append(str(error))

        found = backward_with(model, step)
        optimizer.step()
    assert len(errors) == 1
    assert "another thread" in errors[0]
    assert all(map(torch.equal, found, expected))


def test_dropped_gradients_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    handle = stream_parameters(model)

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("on purpose")

    value = torch.ones(2, 8, device="cuda", requires_grad=True)
    hidden: list[torch.Tensor] = []
    hook = model[0][1].register_forward_hook(lambda block, args, output: hidden.append(output))
    loss = model(value).square().mean()
    hook.remove()
    hidden[0].register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        loss.backward()
    with caplog.at_level("WARNING"):
        handle.synchronize()
    assert "gradients of streamed weights" in caplog.text
    handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "blocks must be"),
        ({"device": None}, "is not a device"),
        ({"device": "cuda:3"}, "torch sees 1 CUDA"),
    ],
    ids=str,
)
def test_wrong_arguments_move_nothing(options: dict[str, object], message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        stream_parameters(model, **options)  # type: ignore[arg-type]
    assert not any(parameter.is_cuda for parameter in model.parameters())
