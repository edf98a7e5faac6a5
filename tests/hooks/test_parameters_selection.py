"""Which blocks are streamed, and what is said of arguments and models that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streamed_models import make_gpt
from torch import nn

from spillover import ConfigError, StateError, stream_parameters


def stack(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]), nn.Linear(8, 8))


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).cuda()


def test_streaming_twice_raises() -> None:
    model = make_gpt()
    stream_parameters(model)
    with pytest.raises(StateError, match="already"):
        stream_parameters(model)
    with pytest.raises(StateError, match="already"):
        stream_parameters(model.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resident": -1}, "negative"),
        ({"resident": 1.5}, "number of blocks or a size"),
        ({"resident": "many"}, "not a size"),
        ({"prefetch": -1}, "prefetch"),
        ({"prefetch": True}, "prefetch"),
        ({"device": "cpu"}, "CUDA device"),
        ({"device": "nonsense"}, "not a device"),
        ({"blocks": "layers.*"}, "no module's name matches"),
        ({"blocks": []}, "empty"),
        ({"blocks": [nn.Linear(1, 1)]}, "not a module of the model"),
        ({"blocks": [3]}, "must be modules"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = make_gpt()
    with pytest.raises(ConfigError, match=message):
        stream_parameters(model, **options)
    assert not any(parameter.is_cuda for parameter in model.parameters())


def test_models_that_cannot_be_streamed() -> None:
    with pytest.raises(ConfigError, match="no repeated blocks"):
        stream_parameters(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="LSTM"):
        stream_parameters(nn.Sequential(nn.LSTM(4, 4), nn.LSTM(4, 4)))
    with pytest.raises(ConfigError, match="meta"):
        stream_parameters(nn.Sequential(*[nn.Linear(4, 4, device="meta") for _ in range(2)]))
    model = stack()
    model[0][0].weight = nn.Parameter(model[0][1].weight.detach())
    with pytest.raises(ConfigError, match="same memory"):
        stream_parameters(model)
    model = stack()
    with pytest.raises(ConfigError, match="inside block"):
        stream_parameters(model, blocks=[model[0], model[0][1]])


# ---- which blocks ------------------------------------------------------------------------------


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.decoder = nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(2))
        self.small = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder:
            value = torch.tanh(layer(value))
        for layer in self.decoder:
            value = torch.tanh(layer(value, value))
        return value


def test_encoder_and_decoder_are_both_found() -> None:
    model = EncoderDecoder()
    handle = stream_parameters(model)
    assert handle.stats.blocks_streamed == 5
    assert model.small[0].weight.is_cuda
    model(inputs()).sum().backward()


def test_blocks_by_pattern_and_by_list() -> None:
    for blocks in ("encoder.[01]", lambda model: list(model.encoder)[:2]):
        model = EncoderDecoder()
        handle = stream_parameters(
            model, blocks=blocks if isinstance(blocks, str) else blocks(model)
        )
        assert handle.stats.blocks_streamed == 2
        assert model.decoder[0].weight.is_cuda
        assert not model.encoder[1].weight.is_cuda
        model(inputs()).sum().backward()


def test_groups_of_groups_are_looked_into() -> None:
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)]
    model = nn.Sequential(*stages)
    assert stream_parameters(model).stats.blocks_streamed == 6


def test_a_model_that_is_itself_the_list_of_blocks() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    assert stream_parameters(model).stats.blocks_streamed == 3
    model(inputs()).sum().backward()


@pytest.mark.parametrize(
    ("resident", "kept"), [(0, 0), (1, 1), (3, 3), (99, 4), ("600B", 2), ("0B", 0), ("1GiB", 4)]
)
def test_resident(resident: int | str, kept: int) -> None:
    handle = stream_parameters(stack(), resident=resident)
    assert handle.stats.blocks_resident == kept


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    model = stack()
    with stream_parameters(model) as handle:
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert handle.stats.blocks_streamed == 0
        handle.synchronize()
        model(inputs()).sum().backward()
