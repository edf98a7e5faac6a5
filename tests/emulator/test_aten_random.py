"""Random numbers on the emulated device: reproducible from the CUDA generator's seed and offset."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(50, device="cuda"),
    "randn": lambda: torch.randn(50, device="cuda"),
    "randint": lambda: torch.randint(0, 1000, (50,), device="cuda"),
    "randperm": lambda: torch.randperm(50, device="cuda"),
    "uniform_": lambda: torch.empty(50, device="cuda").uniform_(2, 3),
    "normal_": lambda: torch.empty(50, device="cuda").normal_(1, 2),
    "exponential_": lambda: torch.empty(50, device="cuda").exponential_(),
    "bernoulli": lambda: torch.full((50,), 0.5, device="cuda").bernoulli(),
    "multinomial": lambda: torch.ones(50, device="cuda").multinomial(20),
    "poisson": lambda: torch.poisson(torch.full((50,), 4.0, device="cuda")),
    "dropout": lambda: F.dropout(torch.ones(50, device="cuda"), 0.5),
    "rrelu": lambda: F.rrelu(-torch.ones(50, device="cuda"), training=True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_seed_reproduces_and_successive_draws_differ(draw: Callable[[], Tensor]) -> None:
    torch.cuda.manual_seed(7)
    first, second = draw(), draw()
    torch.cuda.manual_seed(7)
    assert first.is_cuda
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_offset_advances_and_the_cpu_generator_is_untouched(draw: Callable[[], Tensor]) -> None:
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    torch.cuda.manual_seed(7)
    before = generator.get_offset()
    host_state = torch.get_rng_state()
    draw()
    assert generator.get_offset() > before
    assert generator.get_offset() % 4 == 0
    assert torch.equal(torch.get_rng_state(), host_state)


def test_rng_state_round_trip() -> None:
    torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    first = torch.rand(9, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(9, device="cuda"), first)


def test_generator_argument() -> None:
    a = torch.Generator(device="cuda").manual_seed(5)
    b = torch.Generator(device="cuda").manual_seed(5)
    torch.cuda.manual_seed(0)
    state = torch.cuda.get_rng_state()
    first = torch.randn(9, device="cuda", generator=a)
    assert torch.equal(first, torch.randn(9, device="cuda", generator=b))
    assert not torch.equal(first, torch.randn(9, device="cuda", generator=b))
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_host_generator_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.empty(3, device="cuda").normal_(generator=torch.Generator())


def test_different_seeds_differ() -> None:
    draws = []
    for seed in (0, 1, 2**32, 2**40 + 1):
        torch.cuda.manual_seed(seed)
        draws.append(tuple(torch.rand(4, device="cuda").tolist()))
    assert len(set(draws)) == len(draws)


def test_distributions_look_right() -> None:
    torch.cuda.manual_seed(11)
    normal = torch.randn(40_000, device="cuda")
    assert abs(normal.mean().item()) < 0.03
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)
    uniform = torch.rand(40_000, device="cuda")
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    kept = F.dropout(torch.ones(40_000, device="cuda"), 0.25)
    assert (kept != 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert kept.max().item() == pytest.approx(1 / 0.75)


def test_dropout_without_training_is_the_identity() -> None:
    x = torch.ones(9, device="cuda")
    assert torch.equal(F.dropout(x, 0.5, training=False), x)
    output, mask = torch.native_dropout(x, 0.5, False)
    assert torch.equal(output, x)
    assert mask.all()
