"""Streamed weights are ordered right when streams, or the order of blocks, change under way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from streamed_models import assert_same, gradients_of, make_gpt, make_tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from spillover import offload_activations, stream_parameters


def test_forward_and_backward_on_another_stream() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    side = torch.cuda.Stream()
    for tokens in make_tokens(3):
        on_device = tokens.cuda()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model.loss(on_device).backward()
        torch.cuda.current_stream().wait_stream(side)
        model.loss(on_device).backward()
        for _ in range(2):
            resident.loss(on_device).backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_chains_of_blocks_on_two_streams() -> None:
    class Chains(nn.Module):
        """Even blocks run on another stream than odd ones, unordered until the end."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
            self.side = torch.cuda.Stream()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            chains = [value, value]
            for index, block in enumerate(self.blocks):
                with torch.cuda.stream(main if index % 2 else self.side):
                    chains[index % 2] = torch.tanh(block(chains[index % 2]))
            main.wait_stream(self.side)
            chains[0].record_stream(main)
            return chains[0] + chains[1]

    torch.manual_seed(0)
    model = Chains()
    resident = copy.deepcopy(model.blocks).cuda()
    stream_parameters(model)
    value = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        even, odd = value, value
        for index in range(0, 6, 2):
            even = torch.tanh(resident[index](even))
            odd = torch.tanh(resident[index + 1](odd))
        for _ in range(3):
            assert torch.equal(model(value), even + odd)


class Fill(torch.autograd.Function):
    """Its backward takes 64 KiB of memory and relies on what it writes there."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.full((16 * 1024,), 2.0, device="cuda").sum()


def test_a_fetch_in_vain_does_not_write_into_reused_memory() -> None:
    class Filling(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width * 1024))

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return Fill.apply(value * self.weight[0])

    model = nn.Sequential(nn.Sequential(Filling(32), Filling(1), Filling(16)))
    stream_parameters(model)
    value = torch.ones((), device="cuda", requires_grad=True)
    # Forward of the middle block has the third fetched; backward fetches the first in its stead,
    # and then gets the memory that the third had.
    model[0][1](value).backward()
    assert value.grad.item() == 2 * 16 * 1024


def test_blocks_that_are_skipped_at_random() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, value: torch.Tensor, kept: list[int]) -> torch.Tensor:
            for index in kept:
                value = torch.tanh(self.blocks[index](value))
            return value

    torch.manual_seed(0)
    model = Skipping()
    resident = copy.deepcopy(model).cuda()
    handle = stream_parameters(model)
    value = torch.randn(4, 8, device="cuda")
    for kept in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [5, 3, 1], [1, 1, 4], [4], [0, 1, 2, 3, 4, 5]):
        for candidate in (model, resident):
            candidate(value, kept).sum().backward()
        assert_same(gradients_of(model), gradients_of(resident))
        with torch.no_grad():
            assert torch.equal(model(value, kept[:2]), resident(value, kept[:2]))
    assert handle.stats.waits > 0


def test_blocks_called_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), nn.Linear(8, 8))
    resident = copy.deepcopy(model).cuda()
    handle = stream_parameters(model)
    value = torch.randn(4, 8, device="cuda")
    for candidate in (model, resident):
        hidden = value
        for block in candidate[0]:
            hidden = torch.tanh(block(hidden))
        checkpoint(candidate[0][0], hidden, use_reentrant=False).sum().backward()
    handle.synchronize()
    assert_same(gradients_of(model), gradients_of(resident))


def test_activations_offloaded_as_well() -> None:
    model = make_gpt()
    resident = copy.deepcopy(model).cuda()
    stream_parameters(model)
    for tokens in make_tokens(3):
        with offload_activations(min_bytes=0):
            loss = model.loss(tokens.cuda())
        loss.backward()
        resident.loss(tokens.cuda()).backward()
    assert_same(gradients_of(model), gradients_of(resident))


def test_a_copy_that_is_dropped_on_its_way_is_waited_for() -> None:
    """Before the host writes the weights, also where nobody has used the copy."""
    model = make_gpt()
    handle = stream_parameters(model)
    copies = handle._streamer.copies
    first = handle._streamer.blocks[0]
    for block in (first, handle._streamer.blocks[1]):
        copies.fetch_ahead(block)
        copies.release(block)
    copies.synchronize()
    first.host.zero_()
    handle.remove()
