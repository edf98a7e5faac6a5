"""torch.cuda.graph and make_graphed_callables: replays equal eager runs to the last bit."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spillover import emulator
from spillover._paths import library_path

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]
WIDTH = 16


class Net(nn.Module):
    """Embedding, attention, dropout and normalisation in one."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.table = nn.Embedding(20, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, length) to (batch, length, 20)."""
        x = self.table(tokens)
        q, k, v = self.qkv(x).view(*tokens.shape, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(a.transpose(1, 2).reshape(x.shape), p)
        return self.head(F.gelu(self.norm(x)))


def captured(function: Callable[[], Any], **options: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what the function does, and the tensors that it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = function()
    return graph, result


def warmed_up(function: Callable[[], Any], times: int = 2) -> None:
    """Run on a side stream, as torch's documentation asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(side)


def test_a_capture_changes_nothing_and_a_replay_does_the_work() -> None:
    x, total = torch.full((4,), 2.0, device="cuda"), torch.zeros((), device="cuda")

    def work() -> Tensor:
        assert torch.cuda.is_current_stream_capturing()
        y = x * 3 + 1
        total.add_(y.sum())
        return y

    graph, y = captured(work)
    assert not torch.cuda.is_current_stream_capturing()
    assert total.item() == 0
    for value in (5.0, 6.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [value * 3 + 1] * 4
    assert total.item() == 4 * (16 + 19)


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"foreach": False}],
    ids=["foreach", "fused", "for-loop"],
)
def test_train_steps_equal_eager(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    reference = Net().cuda()
    graphed = copy.deepcopy(reference)
    batches = [torch.randint(20, (3, 7), device="cuda") for _ in range(6)]

    def trainer(model: nn.Module) -> tuple[Callable[[], Tensor], Tensor]:
        batch = batches[0].clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True, **options)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step, batch

    eager_step, eager_batch = trainer(reference)
    step, batch = trainer(graphed)
    torch.cuda.manual_seed(5)
    warmed_up(eager_step)
    torch.cuda.manual_seed(5)
    warmed_up(step)
    graph, loss = captured(step)
    torch.cuda.manual_seed(9)
    expected = []
    for data in batches:
        eager_batch.copy_(data)
        expected.append(eager_step().item())
    torch.cuda.manual_seed(9)
    for data, value in zip(batches, expected, strict=True):
        batch.copy_(data)
        graph.replay()
        assert loss.item() == value
    for a, e in zip(graphed.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, e)


def test_random_numbers_are_new_at_each_replay_and_repeat_with_the_seed() -> None:
    generator = torch.Generator("cuda").manual_seed(3)

    def draw() -> tuple[Tensor, ...]:
        ones = torch.ones(50, device="cuda")
        return (
            torch.rand(50, device="cuda"),
            F.dropout(ones, 0.5),
            torch.empty(50, device="cuda").normal_(generator=generator),
            torch.randperm(50, device="cuda"),
            ones.bernoulli(0.3),
        )

    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        drawn = draw()

    def replays() -> list[list[Tensor]]:
        torch.cuda.manual_seed(7)
        generator.manual_seed(3)
        results = []
        for _ in range(3):
            graph.replay()
            results.append([tensor.clone() for tensor in drawn])
        return results

    first = replays()
    after = torch.rand(5, device="cuda")
    torch.cuda.manual_seed(7)
    generator.manual_seed(3)
    for replay, again in zip(first, replays(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(replay, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], first[1], strict=True))
    # The same numbers as without a graph, and the generator goes on where they end.
    torch.cuda.manual_seed(7)
    generator.manual_seed(3)
    for replay in first:
        assert all(torch.equal(a, b) for a, b in zip(replay, draw(), strict=True))
    assert torch.equal(torch.rand(5, device="cuda"), after)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_graphed_callables_train_like_the_model(dropout: float) -> None:
    torch.manual_seed(0)
    reference = Net(dropout).cuda()
    model = copy.deepcopy(reference)
    sample = torch.randint(20, (2, 5), device="cuda")
    evaluated = copy.deepcopy(reference).eval()
    graphed = torch.cuda.make_graphed_callables(model, (sample,))
    graphed_evaluation = torch.cuda.make_graphed_callables(evaluated, (sample,))
    with torch.no_grad():
        assert torch.equal(graphed_evaluation(sample), reference.eval()(sample))
    reference.train()
    for seed in range(3):
        data = torch.randint(20, (2, 5), device="cuda")
        results = []
        for network in (reference, graphed):
            torch.cuda.manual_seed(seed)
            network.zero_grad(set_to_none=True)  # a graph writes to the same gradients each time
            loss = network(data).square().mean()
            loss.backward()
            results.append(loss.item())
        assert results[0] == results[1]
        for a, e in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a.grad, e.grad)


def test_operators_that_wait_end_the_capture() -> None:
    x = torch.arange(5.0, device="cuda")
    for waits in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: x.cpu(),
        torch.cuda.synchronize,
    ):
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match="captur"),
            torch.cuda.graph(graph),
        ):
            waits()
        assert not torch.cuda.is_current_stream_capturing()
    assert x.sum().item() == 10


def test_later_operators_see_what_earlier_ones_would_write() -> None:
    """Indices and shapes that are computed, copied or filled within the capture."""
    table = torch.arange(12.0, device="cuda").view(4, 3)
    index = torch.tensor([1, 3], device="cuda")

    def work() -> Tensor:
        moved = (index - 1).clone()
        moved.clamp_(min=0)
        out = torch.empty(0, device="cuda")
        torch.index_select(table, 0, moved, out=out)
        zero = torch.zeros(1, dtype=torch.int64, device="cuda")
        return torch.cat([F.embedding(moved, table), table[zero], out])

    graph, result = captured(work)
    index.copy_(torch.tensor([2, 4]))
    graph.replay()
    expected = table[torch.tensor([1, 3, 0, 1, 3], device="cuda")]
    assert torch.equal(result, expected)


def test_a_copy_out_of_what_was_captured_in_part_and_into_it() -> None:
    x, sevens = (
        torch.zeros(64, dtype=torch.int64, device="cuda"),
        torch.full((12,), 7, device="cuda"),
    )
    tokens, table = torch.arange(4, device="cuda"), torch.eye(4, device="cuda")

    def work() -> Tensor:
        x[:12].copy_(sevens)
        x[:8].copy_(x[8:16])
        # The CPU's kernel insists on the first offset being 0.
        return F.embedding_bag(tokens, table, x[4:5], mode="sum")

    graph, y = captured(work)
    graph.replay()
    assert y.tolist() == [[1, 1, 1, 1]]


def test_indices_that_are_filled_in_later() -> None:
    table = torch.arange(12.0, device="cuda").view(4, 3)
    index = torch.full((2,), 1 << 40, device="cuda")
    graph, result = captured(lambda: table[index].sum(0))
    index.copy_(torch.tensor([0, 3]))
    graph.replay()
    assert result.tolist() == [9, 11, 13]


def test_side_streams_and_copies_within_a_capture() -> None:
    host = torch.full((8,), 3.0).pin_memory()
    back = torch.zeros(8).pin_memory()
    side = torch.cuda.Stream()

    def work() -> Tensor:
        x = host.to("cuda", non_blocking=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        z = x + 1
        torch.cuda.current_stream().wait_stream(side)
        result = y + z
        back.copy_(result, non_blocking=True)
        return result

    graph, result = captured(work)
    assert back.sum() == 0
    for value in (3.0, 4.0):
        torch.cuda.synchronize()
        host.fill_(value)
        graph.replay()
        assert result.tolist() == [value * 3 + 1] * 8
        torch.cuda.synchronize()
        assert back.tolist() == result.tolist()


def test_autocast_and_views() -> None:
    torch.manual_seed(0)
    model, x = Net(0.0).cuda(), torch.randint(20, (2, 5), device="cuda")

    def work() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        y[:, 0] = 0
        return y.transpose(0, 1).contiguous().float()

    with torch.no_grad():
        warmed_up(work)
        graph, result = captured(work)
        x.copy_(torch.randint(20, (2, 5)))
        graph.replay()
        assert torch.equal(result, work())


def test_pools_are_shared_and_given_back() -> None:
    gc.collect()  # graphs of other tests
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    x = torch.ones(1 << 20, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    first, y = captured(lambda: x + 1, pool=pool)
    second, z = captured(lambda: y * 2, pool=first.pool())
    assert first.pool() == second.pool() == pool
    first.replay()
    second.replay()
    assert z[0].item() == 4
    first.reset()
    second.reset()
    x = y = z = torch.empty(0)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_debug_dump_and_kept_graphs(tmp_path: Path) -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    graph.enable_debug_mode()
    with torch.cuda.graph(graph):
        y = x + 1
    assert graph.raw_cuda_graph() != 0
    graph.instantiate()
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    path = tmp_path / "graph.dot"
    # As torch before 2.14 does it; later ones call a library with a CUDA runtime of its own.
    driver = ctypes.CDLL(str(library_path("emulator/libcuda.so.1")))
    raw = ctypes.c_uint64(graph.raw_cuda_graph())
    assert driver.cuGraphDebugDotPrint(raw, str(path).encode(), ctypes.c_uint(1)) == 0
    assert "aten::add" in path.read_text()


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_capture_error_modes(mode: str) -> None:
    x = torch.ones(3, device="cuda")
    event = torch.cuda.Event()
    event.record()
    graph = torch.cuda.CUDAGraph()

    def work() -> None:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            x.add_(1)
            event.query()

    if mode == "relaxed":
        work()
        graph.replay()
        assert x.tolist() == [2, 2, 2]
    else:
        with pytest.raises(RuntimeError, match="captur"):
            work()
        assert x.tolist() == [1, 1, 1]


def test_a_replay_that_nothing_orders_is_a_hazard() -> None:
    x = torch.ones(1 << 10, device="cuda")
    graph, y = captured(lambda: x * 2)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.replay()
    with pytest.raises(RuntimeError, match="in a graph"):
        y.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    y.add_(1)
    assert len(emulator.hazards()) == 1
    emulator.clear_hazards()


@pytest.mark.parametrize("schedule", [pytest.param("late", marks=pytest.mark.soak), "threaded"])
def test_a_replay_computes_with_the_programs_thread_count(
    run_emulated: RunEmulated, schedule: str
) -> None:
    # The product of this shape differs in its last bits between one thread and two.
    run_emulated(
        """
        import torch

        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(6, 8, generator=generator)
        b = torch.randn(8, 32, generator=generator)
        device_a, device_b = a.cuda(), b.cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = device_a @ device_b
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(product.cpu(), a @ b)
        assert torch.get_num_threads() == 1
        """,
        schedule=schedule,
        env={"OMP_NUM_THREADS": "2"},
    )


PROGRAM = """
import json, os, sys
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)).cuda()
optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
x, side = torch.zeros(6, 8, device="cuda"), torch.cuda.Stream()

def step():
    optimizer.zero_grad(set_to_none=True)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss

side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(2):
        step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = step()
torch.cuda.manual_seed(1)
losses = []
for value in range(4):
    x.copy_(torch.full((6, 8), float(value)).pin_memory(), non_blocking=True)
    graph.replay()
    losses.append(loss.item())
del graph, loss
torch.cuda.empty_cache()
print(json.dumps([losses, [p.sum().item() for p in model.parameters()]]))
"""


@pytest.mark.parametrize("combinations", [2, pytest.param(5, marks=pytest.mark.soak)])
def test_schedules_and_allocators_agree(run_emulated: RunEmulated, combinations: int) -> None:
    outputs = [
        json.loads(
            run_emulated(
                PROGRAM,
                schedule=schedule,
                env={"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"},
            ).stdout
        )
        for schedule, expandable in (
            ("late", False),
            ("random", True),
            ("late", True),
            ("eager", False),
            ("threaded", True),
        )[:combinations]
    ]
    assert all(output == outputs[0] for output in outputs)
    assert len(set(outputs[0][0])) == 4
