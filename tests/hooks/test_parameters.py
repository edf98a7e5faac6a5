"""Streamed weights give the bits of the all-resident run, whatever a model does with its blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from streamed_models import (
    Block,
    assert_same,
    assert_same_outcome,
    gradients_of,
    make_gpt,
    make_tokens,
    train,
    weights_of,
)
from torch import nn

from spillover import stream_parameters


@pytest.mark.parametrize("mode", ["plain", "outer", "reentrant", "inner"])
@pytest.mark.parametrize(
    "stream", [{"resident": 1}, {"resident": "20KiB", "prefetch": 2}, {"prefetch": 0}], ids=str
)
def test_training_equals_the_resident_run(mode: str, stream: dict[str, Any]) -> None:
    model = make_gpt(dropout=0.1)
    model.mode = mode
    for block in model.blocks:
        block.inner_checkpoint = mode == "inner"
    accumulate = 2 if mode in ("plain", "outer") else 1
    expected = train(model, stream=None, accumulate=accumulate)
    assert_same_outcome(train(model, stream=stream, accumulate=accumulate), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    model = make_gpt().to(dtype)
    assert_same_outcome(
        train(model, stream={}, accumulate=3), train(model, stream=None, accumulate=3)
    )


def both(
    model: nn.Module, inputs: torch.Tensor, stream: dict[str, Any], passes: int = 2
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the resident and the streamed model after ``passes`` backwards."""
    resident = copy.deepcopy(model).cuda()
    streamed = copy.deepcopy(model)
    stream_parameters(streamed, **stream)
    for candidate in (resident, streamed):
        for _ in range(passes):
            candidate(inputs.cuda()).square().mean().backward()
    return gradients_of(resident), gradients_of(streamed)


def layers(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(8, 8))


def test_a_block_called_twice_and_a_weight_used_twice_in_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(value))))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Twice(), Twice()])

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            for block in [*self.blocks, *reversed(self.blocks), *self.blocks]:
                value = block(value)
            return value

    torch.manual_seed(0)
    assert_same(*both(Shared(), torch.randn(4, 8), {"prefetch": 1}))


def test_a_weight_shared_by_blocks_stays_on_the_device() -> None:
    torch.manual_seed(0)
    model = layers(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0][2].weight = model[0][0].weight
    assert_same(*both(model, torch.randn(4, 8), {}))
    stream_parameters(model)
    assert model[0][0].weight.is_cuda
    assert model[0][0].weight is model[0][2].weight
    assert not model[0][1].weight.is_cuda


def test_frozen_weights() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8).requires_grad_(False)
            self.adapter = nn.Linear(8, 8)

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.base(value) + self.adapter(value))

    torch.manual_seed(0)
    model = layers(*[Adapted() for _ in range(4)])
    expected, found = both(model, torch.randn(4, 8), {})
    assert_same(expected, found)
    assert not any("base" in name for name in found)


def test_weights_frozen_and_thawed_later() -> None:
    torch.manual_seed(0)
    model = layers(*[nn.Linear(8, 8) for _ in range(3)])
    stream_parameters(model)
    value = torch.randn(4, 8, device="cuda")
    model[0].requires_grad_(False)
    model(value).sum().backward()
    assert model[0][1].weight.grad is None
    model[0].requires_grad_(True)
    model(value).sum().backward()
    assert model[0][1].weight.grad is not None


def test_buffers_stay_on_the_device() -> None:
    torch.manual_seed(0)
    model = layers(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3)])
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    value = torch.randn(16, 8, device="cuda")
    for candidate in (resident, model):
        candidate(value).square().sum().backward()
        candidate.eval()
    assert model[0][1][1].running_mean.is_cuda
    assert_same(
        {name: entry.cpu() for name, entry in resident.named_buffers()},
        {name: entry.cpu() for name, entry in model.named_buffers()},
    )
    assert torch.equal(resident(value), model(value))


def test_weights_in_another_memory_format() -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
    value = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    wrapped = nn.Sequential(model)
    assert_same(*both(wrapped, value, {"blocks": "0.*"}))


def test_inference_then_training() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    handle = stream_parameters(model, resident=1)
    tokens = make_tokens(1)[0].cuda()
    for context in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with context():
                assert torch.equal(model(tokens), resident(tokens))
    for candidate in (model, resident):
        candidate.loss(tokens).backward()
    assert_same(gradients_of(model), gradients_of(resident))
    assert handle.stats.waits == 0


def test_forward_without_backward_then_backward() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    first, second = (tokens.cuda() for tokens in make_tokens(2))
    for candidate in (model, resident):
        kept = candidate.loss(first)
        candidate.loss(second)  # Its graph is dropped.
        kept.backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_backward_twice_over_one_graph() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    tokens = make_tokens(1)[0].cuda()
    for candidate in (model, resident):
        loss = candidate.loss(tokens)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_gradient_of_the_input_alone() -> None:
    torch.manual_seed(0)
    model = layers(*[nn.Linear(8, 8) for _ in range(4)])
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    value = torch.randn(4, 8, device="cuda", requires_grad=True)
    found = [torch.autograd.grad(net(value).square().sum(), value)[0] for net in (model, resident)]
    assert torch.equal(*found)
    assert model[0][0].weight.grad is None


class Leaky(nn.Module):
    """Leaves a loss in an attribute, so backward can reach its weights past its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.aside = nn.Linear(8, 8)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.loss = torch.tanh(self.aside(value)).square().mean()
        return torch.tanh(self.linear(value))


@pytest.mark.parametrize("with_output", [True, False])
def test_backward_that_does_not_come_through_the_output(with_output: bool) -> None:
    torch.manual_seed(0)
    model = layers(*[Leaky() for _ in range(5)])
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    value = torch.randn(4, 8, device="cuda")
    for candidate in (model, resident):
        output = candidate(value)
        loss = sum(block.loss for block in candidate[0])
        (loss + output.sum() if with_output else loss).backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_a_custom_function_that_keeps_the_weight_itself() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.kept = (value, weight)
            return value * weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value, weight = ctx.kept
            return gradient * weight, (gradient * value).sum(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tanh(Scale.apply(value, self.weight))

    torch.manual_seed(0)
    assert_same(*both(layers(*[Scaled() for _ in range(5)]), torch.randn(4, 8), {}))


def test_structured_outputs_and_keyword_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, *, value: torch.Tensor) -> dict[str, Any]:
            return {"value": torch.tanh(self.linear(value)), "more": [value.sum(), None]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(4))

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            total = value.new_zeros(())
            for block in self.blocks:
                output = block(value=value)
                value, total = output["value"], total + output["more"][0]
            return value + total

    torch.manual_seed(0)
    assert_same(*both(Model(), torch.randn(4, 8), {}))


def test_saved_tensor_hooks_around_the_model_see_activations_only() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    tokens = make_tokens(1)[0].cuda()
    with torch.autograd.graph.save_on_cpu(pin_memory=False):
        loss = model.loss(tokens)
    loss.backward()
    resident.loss(tokens).backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_autocast() -> None:
    model = make_gpt()
    model.mode = "outer"
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    tokens = make_tokens(1)[0].cuda()
    for candidate in (model, resident):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = candidate.loss(tokens)
        loss.backward()
    assert_same(gradients_of(model), gradients_of(resident))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.fails_in = ""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.fails_in == "forward":
            raise KeyError("forward")
        if self.fails_in == "interrupt":
            raise KeyboardInterrupt
        output = torch.tanh(self.linear(value))
        if self.fails_in == "backward":
            output.register_hook(self.fail)
        return output

    @staticmethod
    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("backward")


@pytest.mark.parametrize("where", ["forward", "backward", "interrupt"])
def test_training_goes_on_after_an_exception(where: str) -> None:
    torch.manual_seed(0)
    model = layers(*[Failing() for _ in range(5)])
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    value = torch.randn(4, 8, device="cuda")
    model[0][2].fails_in = where
    with pytest.raises((KeyError, KeyboardInterrupt)):
        model(value).sum().backward()
    model[0][2].fails_in = ""
    model.zero_grad()
    for candidate in (model, resident):
        candidate(value).sum().backward()
    assert_same(gradients_of(model), gradients_of(resident))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_weights_keep_their_values_when_streaming_starts_and_ends() -> None:
    model = nn.Sequential(nn.Sequential(*[Block(8) for _ in range(3)]))
    before = weights_of(model)
    with stream_parameters(model, resident=1):
        assert_same(weights_of(model), before)
    assert_same(weights_of(model), before)
