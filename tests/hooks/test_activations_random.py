"""Random programs over saved tensors: the bits of the plain run, and no hazards."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_contexts import offloading
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spillover import offload_activations

WIDTH = 16
Step = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def overwrite(x: torch.Tensor) -> torch.Tensor:
    """In-place changes that autograd allows: of what nothing needs as it was."""
    y = x * 1.5
    y.add_(0.25)
    y[:, ::2].mul_(0.5)
    return torch.relu_(y)


def checkpointed(x: torch.Tensor, weights: list[torch.Tensor], reentrant: bool) -> torch.Tensor:
    def region(value: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(value @ weights[0])
        return functional.dropout(hidden @ weights[1], 0.2).tanh()

    found: torch.Tensor = checkpoint(region, x, use_reentrant=reentrant)
    return found


def autocast(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return functional.silu(x @ weights[2]).float()


def views(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    left, right = x.exp().clamp(max=3).chunk(2, dim=1)
    flipped = left.t().contiguous().view(-1)[3:-5].as_strided((4, 5), (6, 1))
    return torch.cat([left * right, right.flip(0)], 1) + flipped.square().mean()


def unused(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    _ = (x.exp() @ weights[0]).softmax(-1)
    return x.sin()


def nested(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        y = (x @ weights[1]).tanh() * x
    with offloading(prefetch=0):
        return y.square() * 0.5 + x


def failing(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    with contextlib.suppress(RuntimeError):
        x.exp() @ torch.empty(3, 5, device=x.device)
    return x.sigmoid() * x


def slope(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    value = ((x @ weights[0]).tanh() ** 2).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    return x + gradient * 0.1


STEPS: list[Step] = [
    lambda x, w: functional.layer_norm(x @ w[0], (WIDTH,)),
    lambda x, w: functional.gelu(x @ w[1] + x @ w[1].t()),
    lambda x, w: overwrite(x),
    lambda x, w: checkpointed(x, w, False),
    lambda x, w: checkpointed(x, w, True),
    lambda x, w: functional.dropout(x.softmax(-1), 0.3) @ w[2],
    autocast,
    views,
    unused,
    nested,
    failing,
    slope,
]


def run(seed: int, make: Callable[[], Any]) -> list[torch.Tensor]:
    """Gradients of one program; ``make`` gives the context to run it in."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    weights = [torch.randn(WIDTH, WIDTH).div(4).cuda().requires_grad_() for _ in range(3)]
    leaf = torch.randn(8, WIDTH).cuda().requires_grad_()
    # Reentrant checkpointing and torch.autograd.grad do not go together in one graph.
    steps = [choose.choice(STEPS) for _ in range(choose.randint(3, 9))]
    if slope in steps:
        steps = [step for step in steps if step is not STEPS[4]]
    context = make()
    inside, retain = choose.random() < 0.3, choose.random() < 0.4
    fails = choose.random() < 0.3

    def backward(value: torch.Tensor, hidden: list[torch.Tensor]) -> None:
        if fails:
            # A backward that raises half way, on a graph that is used again.
            def stop(gradient: torch.Tensor) -> None:
                raise ZeroDivisionError

            hook = hidden[len(hidden) // 2].register_hook(stop)
            with contextlib.suppress(ZeroDivisionError):
                value.backward(retain_graph=True)
            hook.remove()
            for tensor in (leaf, *weights):
                tensor.grad = None
        if retain:
            value.backward(retain_graph=True)
        value.backward()

    hidden = [leaf * 1]
    with context:
        for step in steps:
            hidden.append(step(hidden[-1], weights))
        value = hidden[-1].square().mean() + sum(item.mean() for item in hidden[1::2])
        if inside:
            backward(value, hidden)
    if not inside:
        backward(value, hidden)
    torch.autograd.set_detect_anomaly(False)
    hidden.clear()
    grads = [tensor.grad for tensor in (leaf, *weights) if tensor.grad is not None]
    return [value.detach().cpu(), *(gradient.cpu() for gradient in grads)]


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Bit for bit, but for which NaN it is: a program may overflow."""
    return len(found) == len(expected) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


def options_of(seed: int, folder: str | Path | None) -> dict[str, Any]:
    choose = random.Random(seed * 7 + 1)
    options: dict[str, Any] = {
        "min_bytes": choose.choice([1, 256, 513]),
        "in_flight_max": choose.choice([1, 4096, "1MiB"]),
        "prefetch": choose.choice([0, 1, 3000, "1MiB"]),
    }
    if folder is not None and choose.random() < 0.3:
        options.update(tier="disk", directory=folder)
    return options


def check(seed: int, folder: str | Path | None = None) -> None:
    expected = run(seed, contextlib.nullcontext)
    options = options_of(seed, folder)
    found = run(seed, lambda: offload_activations(**options))
    assert are_equal(found, expected), (seed, options)


def check_together(seeds: list[int]) -> None:
    """Programs without random numbers, on threads that share one context."""
    context = offloading(in_flight_max=4096, prefetch=3000)
    failures: list[BaseException] = []

    def program(seed: int, used: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        leaf = torch.randn(8, WIDTH, generator=generator).cuda().requires_grad_()
        weight = torch.randn(WIDTH, WIDTH, generator=generator).cuda().requires_grad_()
        with used:
            value = leaf * 1
            for step in (views, unused, failing):
                value = step(value @ weight, [weight])
        value.square().mean().backward()
        assert leaf.grad is not None
        assert weight.grad is not None
        return [leaf.grad.cpu(), weight.grad.cpu()]

    def work(seed: int) -> None:
        try:
            expected = program(seed, contextlib.nullcontext())
            assert are_equal(program(seed, context), expected), seed
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_random_programs(tmp_path: Path) -> None:
    for seed in range(12):
        check(seed, tmp_path)


def test_random_programs_on_threads() -> None:
    check_together([1, 2, 3])


SCHEDULED = """
import sys
sys.path.insert(0, FOLDER)
import torch
from test_activations_random import check, check_together
for seed in range(FIRST, LAST):
    check(seed, DIRECTORY)
check_together([FIRST, FIRST + 1])
torch.cuda.synchronize()
assert not spillover.emulator.hazards(), spillover.emulator.hazards()
print("equal")
"""


def scheduled(first: int, last: int, directory: Path) -> str:
    found = SCHEDULED.replace("FOLDER", repr(str(Path(__file__).parent)))
    found = found.replace("DIRECTORY", repr(str(directory)))
    return found.replace("FIRST", str(first)).replace("LAST", str(last))


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["late", "eager", "threaded", "random"])
def test_many_random_programs(
    run_emulated: Callable[..., Any], tmp_path: Path, schedule: str
) -> None:
    code = scheduled(100, 400, tmp_path)
    assert "equal" in run_emulated(code, schedule=schedule, seed=3, timeout=1800).stdout
