"""A model whose weights are read in many ways, and its training with updates under the forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spillover.optim import AdamW, _host_step, _overlap
from spillover.optim._host_optimizer import HostOptimizer

STEPS = 4


_wait_until: Any = _overlap.PendingStep._wait_until


class LazyWorker:
    """Has overlapped updates make progress only while somebody waits for one.

    Whoever does not wait then reads old weights, every time.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._wanted: list[Callable[[], bool]] = []
        self._is_open = False
        self.batches = 0

    def await_demand(self) -> None:
        """On the worker, before each batch, and before it takes what another step may want."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._is_open or not all(is_so() for is_so in self._wanted)
            )

    def count_batch(self) -> None:
        """On the worker, before each batch."""
        with self._condition:
            self.batches += 1

    def wait(self, pending: _overlap.PendingStep, is_so: Callable[[], bool]) -> None:
        """What somebody waits for."""
        with self._condition:
            self._wanted.append(is_so)
            self._condition.notify_all()
        try:
            _wait_until(pending, is_so)
        finally:
            with self._condition:
                self._wanted.remove(is_so)

    def open(self) -> None:
        """Let it run freely."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()

    def close(self) -> None:
        """Be lazy again."""
        with self._condition:
            self._is_open = False

    def install(self, set_attribute: Callable[[Any, str, Any], Any]) -> None:
        """By ``setattr``, or a test's."""
        update_batch: Any = _host_step._Pipeline._update_batch

        def replaced(pipeline: Any, *batch: Any) -> None:
            if threading.current_thread().name.startswith("spillover-optimizer"):
                self.await_demand()
                self.count_batch()
            update_batch(pipeline, *batch)

        run_beside: Any = HostOptimizer._run_beside

        def run_when_wanted(optimizer: Any, pending: Any) -> None:
            self.await_demand()
            run_beside(optimizer, pending)

        set_attribute(HostOptimizer, "_run_beside", run_when_wanted)
        set_attribute(_host_step._Pipeline, "_update_batch", replaced)
        set_attribute(
            _overlap.PendingStep,
            "_wait_until",
            lambda pending, is_so: self.wait(pending, is_so),
        )


class Net(nn.Module):
    """A layer whose weight another one uses, attention, normalisation, a parameter of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.scale = nn.Parameter(torch.ones(32))
        self.unused = nn.Linear(32, 32)
        self.to("cuda", dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = self.table(tokens)
        value = value + self.attention(value, value, value, need_weights=False)[0]
        for layer in self.layers:
            value = torch.tanh(layer(value))
        # The weight of another module.
        value = nn.functional.linear(self.norm(value) * self.scale, self.layers[0].weight)
        return nn.functional.linear(value, self.table.weight)


def tokens_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 40, (4, 9), generator=generator).cuda()


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens = tokens_of(step)
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def set_ones(model: nn.Module) -> None:
    """As gradients: a step of SGD with ``lr=1.0`` then subtracts 1."""
    for each in model.parameters():
        each.grad = torch.ones_like(each)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and the rest, as decay is mostly set: forward alternates between both."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def train(
    *,
    overlaps: bool,
    make: Any = AdamW,
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    after_step: Callable[[nn.Module, Any], Any] | None = None,
    micro_steps: int = 1,
    set_to_none: bool = True,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> tuple[list[float], nn.Module, Any, list[Any]]:
    """Losses, model, optimizer, and what ``after_step`` returned, after some steps."""
    model = Net(dtype)
    wrapped = wrap(model)
    optimizer = make(
        groups_of(model), lr=0.01, **options, **({"overlap": wrapped} if overlaps else {})
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    losses, found = [], []
    for step in range(steps):
        for micro_step in range(micro_steps):
            loss = loss_of(wrapped, step * micro_steps + micro_step)
            loss.backward()
        losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if after_step is not None:
            found.append(after_step(wrapped, optimizer))
        optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.synchronize()
    return [float(loss) for loss in losses], model, optimizer, found


def assert_same_run(found: Any, expected: Any) -> None:
    """Losses, weights, state and observations are equal to the last bit."""
    assert found[0] == expected[0]
    for one, other in zip(found[1].parameters(), expected[1].parameters(), strict=True):
        assert torch.equal(one, other)
    states = [run[2].state_dict()["state"] for run in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for key, entry in states[1].items():
        assert entry.keys() == states[0][key].keys()
        for name, value in entry.items():
            assert torch.equal(states[0][key][name], value), (key, name)
    for one, other in zip(found[3], expected[3], strict=True):
        assert all(map(torch.equal, one, other))
