"""Programs without an ordering bug, none of which the checker may report.

A group is a set of programs that run one after the other in a process of its own, with its own
allocator: ``python -m benchmarks._hazards.clean GROUP SCHEDULE [uninitialized]`` prints what was
reported of each as JSON; :func:`measure` does it.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import _harness

WIDTH = 32


def _torch() -> Any:
    import torch

    return torch


def _model(device: str = "cuda") -> Any:
    torch = _torch()
    torch.manual_seed(0)
    nn = torch.nn
    blocks = [
        nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.1, batch_first=True) for _ in range(3)
    ]
    return nn.Sequential(*blocks).to(device)


def _loss(model: Any, x: Any) -> Any:
    return model(x).square().mean()


def _batch() -> Any:
    return _torch().randn(4, 16, WIDTH, device="cuda")


def training() -> None:
    """AdamW in its three implementations, and SGD."""
    torch = _torch()
    optim = torch.optim
    makers = [
        functools.partial(optim.AdamW, foreach=True),
        functools.partial(optim.AdamW, fused=True),
        functools.partial(optim.AdamW, foreach=False, capturable=True),
        functools.partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    ]
    for make in makers:
        model = _model()
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            _loss(model, _batch()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        _loss(model, _batch()).item()


def autocast_and_scaler() -> None:
    torch = _torch()
    model, scaler = _model(), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = _loss(model, _batch())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def checkpointing() -> None:
    torch = _torch()
    from torch.utils.checkpoint import checkpoint

    model, x = _model(), _batch()
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    x.sum().backward()
    torch.cuda.synchronize()


def saved_tensors_on_cpu() -> None:
    torch = _torch()
    model = _model()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = _loss(model, _batch())
    loss.backward()


def data_loader_with_pinned_memory() -> None:
    torch = _torch()
    data = torch.utils.data.TensorDataset(torch.randn(64, 16, WIDTH), torch.arange(64))
    loader = torch.utils.data.DataLoader(data, batch_size=8, pin_memory=True)
    model = _model()
    for _ in range(2):
        for x, y in loader:
            on_device = x.to("cuda", non_blocking=True)
            (_loss(model, on_device) + y.to("cuda", non_blocking=True).sum()).item()


def data_loader_with_workers() -> None:
    torch = _torch()
    data = torch.utils.data.TensorDataset(torch.randn(64, 16, WIDTH))
    loader = torch.utils.data.DataLoader(data, batch_size=8, pin_memory=True, num_workers=1)
    for (x,) in loader:
        x.to("cuda", non_blocking=True).sum()
    torch.cuda.synchronize()


def autograd_on_several_threads() -> None:
    torch = _torch()
    models = [_model() for _ in range(3)]

    def work(model: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = _batch()
            _loss(model, x).backward()
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        sum(p.grad.sum() for p in model.parameters()).item()


def streams_and_events() -> None:
    """Double buffering with events, record_stream and a stream that is made anew each time."""
    torch = _torch()
    copies, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    staging = [torch.zeros(1 << 14).pin_memory() for _ in range(2)]
    free = [torch.cuda.Event() for _ in range(2)]
    for step in range(6):
        slot = step % 2
        free[slot].synchronize()
        staging[slot].fill_(step)
        with torch.cuda.stream(copies):
            batch = staging[slot].to("cuda", non_blocking=True)
            free[slot].record()
        compute.wait_stream(copies)
        batch.record_stream(compute)
        (batch * 2).sum()
        own = torch.cuda.Stream()
        own.wait_stream(compute)
        with torch.cuda.stream(own):
            result = batch + 1
        compute.wait_stream(own)
        result.record_stream(compute)
        result.mul_(2)


def threads_with_queues() -> None:
    """Knowledge passes through queues, events, conditions, futures and thread ends."""
    torch = _torch()
    todo: queue.Queue[Any] = queue.Queue(2)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def load() -> None:
        side = torch.cuda.Stream()
        for step in range(8):
            with torch.cuda.stream(side):
                batch = torch.full((1 << 12,), float(step)).pin_memory().to("cuda")
            side.synchronize()
            todo.put(batch)
        todo.put(None)

    def compute() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while (batch := todo.get()) is not None:
                result = batch * 2
                torch.cuda.current_stream().synchronize()
                done.put(result)
        done.put(None)

    threads = [threading.Thread(target=target) for target in (load, compute)]
    for thread in threads:
        thread.start()
    while (result := done.get()) is not None:
        result.sum().item()
    for thread in threads:
        thread.join()

    def fill(value: float) -> Any:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.full((1 << 12,), value, device="cuda")
            torch.cuda.current_stream().synchronize()
        return tensor

    with ThreadPoolExecutor(2) as pool:
        for tensor in pool.map(fill, [1.0, 2.0, 3.0]):
            tensor.add_(1)


def polling() -> None:
    """Whoever polls an event tells everyone, as allocators rely on."""
    torch = _torch()
    tensor, seen = torch.zeros(1 << 12, device="cuda"), [False]
    event, side = torch.cuda.Event(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def work() -> None:
        with torch.cuda.stream(side):
            tensor.add_(1)
            event.record()
        while not event.query():
            time.sleep(0)
        seen[0] = True

    thread = threading.Thread(target=work)
    thread.start()
    while not seen[0]:
        time.sleep(0)
    tensor.mul_(2)
    thread.join()


def annotated_flag() -> None:
    """A signal that the checker cannot see, annotated."""
    from spillover import emulator

    torch = _torch()
    tensor, ready = torch.zeros(1 << 12, device="cuda"), [False]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def work() -> None:
        with torch.cuda.stream(side):
            tensor.add_(1)
        side.synchronize()
        emulator.release("ready")
        ready[0] = True

    thread = threading.Thread(target=work)
    thread.start()
    while not ready[0]:
        time.sleep(0)
    emulator.acquire("ready")
    tensor.mul_(2)
    thread.join()


def indexing_and_reductions() -> None:
    torch = _torch()
    x = torch.randn(64, 64, device="cuda")
    x[x > 0] = 0
    x[:, ::2].add_(1)
    x.t().contiguous()[3:5].sum().item()
    torch.cat([x, x]).sort(0).values.cumsum(0).nonzero()
    torch.cuda.empty_cache()


def embedding_and_convolution() -> None:
    torch = _torch()
    nn = torch.nn
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    ).cuda()  # fmt: skip
    labels = torch.randint(10, (4,), device="cuda")
    loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 16, 16, device="cuda")), labels)
    table = nn.Embedding(10, 8).cuda()
    (loss + table(labels).sum()).backward()


def graphs() -> None:
    """A training step in a graph, with side streams, replayed on fresh data."""
    torch = _torch()
    model, x, side = _model(), _batch(), torch.cuda.Stream()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            offset = x.mean() * 0
        loss = _loss(model, x)
        torch.cuda.current_stream().wait_stream(side)
        (loss + offset).backward()
        optimizer.step()
        return loss.detach()

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(3):
        x.copy_(torch.randn(4, 16, WIDTH).pin_memory(), non_blocking=True)
        graph.replay()
        loss.item()


def our_offload() -> None:
    """Streamed weights, activations on the host, and AdamW with its state there."""
    import spillover

    torch = _torch()
    model = _model("cpu")
    handle = spillover.stream_parameters(model)
    optimizer = spillover.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        with spillover.offload_activations(min_bytes=0, keep_on_device=0):
            loss = _loss(model, _batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    handle.remove()
    torch.cuda.synchronize()


def our_offload_to_disk() -> None:
    import spillover

    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        offload = spillover.offload_activations(
            tier="disk", directory=folder, min_bytes=0, keep_on_device=0
        )
        with offload:
            loss = _loss(model, _batch())
        loss.backward()


def _rank(rank: int, port_file: str, fully_sharded: bool) -> None:
    torch = _torch()
    distributed = torch.distributed
    store = distributed.FileStore(port_file, 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if fully_sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = _model()
        mesh = init_device_mesh("cuda", (2,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(_model(), device_ids=[0])
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, _batch()).backward()
        optimizer.step()
    torch.cuda.synchronize()
    distributed.destroy_process_group()


def _distributed(*, fully_sharded: bool) -> list[str]:
    """Two processes; their reports."""
    kind = "fsdp" if fully_sharded else "ddp"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks._hazards.clean", "rank", sys.argv[2]]
        processes = [
            subprocess.Popen(
                [*command, str(rank), os.path.join(folder, "store"), kind],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"a rank of {kind} ended with {process.returncode}: {output}")
    return [text for output in outputs for text in json.loads(output.splitlines()[-1])]


def data_parallel_over_gloo() -> list[str]:
    return _distributed(fully_sharded=False)


def fully_sharded_over_gloo() -> list[str]:
    return _distributed(fully_sharded=True)


_SINGLE: tuple[Callable[[], Any], ...] = (
    training,
    autocast_and_scaler,
    checkpointing,
    saved_tensors_on_cpu,
    data_loader_with_pinned_memory,
    data_loader_with_workers,
    autograd_on_several_threads,
    streams_and_events,
    threads_with_queues,
    polling,
    annotated_flag,
    indexing_and_reductions,
    embedding_and_convolution,
    graphs,
)

GROUPS: dict[str, tuple[Callable[[], Any], ...]] = {
    "native": _SINGLE,
    "expandable": (training, streams_and_events, threads_with_queues, checkpointing, graphs),
    "pool": (training, streams_and_events, threads_with_queues, autograd_on_several_threads),
    "offload": (our_offload, our_offload_to_disk),
    "distributed": (data_parallel_over_gloo, fully_sharded_over_gloo),
}

#: Quick enough for every test run.
QUICK_GROUPS = ("offload",)


def measure(group: str, schedule: str, *, uninitialized: bool = False) -> dict[str, list[str]]:
    """What the checker reports of the programs of a group, each by its name; blank is right."""
    command = [sys.executable, "-m", "benchmarks._hazards.clean", group, schedule]
    output = subprocess.run(
        command + (["uninitialized"] if uninitialized else []),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    result: dict[str, list[str]] = json.loads(output.splitlines()[-1])
    return result


def _run_group(programs: tuple[Callable[[], Any], ...]) -> dict[str, list[str]]:
    from spillover import emulator

    torch = _torch()
    reports = {}
    for program in programs:
        emulator.clear_hazards()
        found = program()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        reports[program.__name__] = (found or []) + emulator.hazards()
    return reports


def _main(group: str, schedule: str, *rest: str) -> None:
    import spillover.emulator

    if group == "expandable":
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    spillover.emulator.enable(
        vram="512MiB",
        schedule=schedule,  # type: ignore[arg-type]
        hazards="count",
        uninitialized="uninitialized" in rest,
    )
    if group == "pool":
        spillover.allocator.install()
    _torch().set_num_threads(1)
    if group == "rank":
        _rank(int(rest[0]), rest[1], rest[2] == "fsdp")
        _harness.end_measurement(spillover.emulator.hazards())
    _harness.end_measurement(_run_group(GROUPS[group]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
