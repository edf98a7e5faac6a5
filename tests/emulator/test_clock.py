"""Simulated time of PyTorch programs: the same in every run, and the sum of its parts."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spillover import emulator
from spillover.emulator import costs

_PRELUDE = """
import json, sys
from spillover import emulator
emulator.enable(vram="1GiB", profile="rtx4090", **OPTIONS)
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
"""

_STEP = """
nn = torch.nn
layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)]
model = nn.Sequential(nn.Embedding(64, 64), *layers, nn.Linear(64, 64)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(64, (2, 16), device="cuda")
ends = []
for _ in range(3):
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    ends.append(emulator.now_ns())
"""

_THREADS = """
import queue, threading, time
from concurrent.futures import ThreadPoolExecutor
items, done, order, lock = queue.Queue(2), queue.SimpleQueue(), [], threading.Lock()

def produce():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(6):
            tensor = torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
            with lock:
                order.append(("made", i, emulator.now_ns()))
            items.put((tensor, stream.record_event()))
    items.put(None)

def consume():
    while (item := items.get()) is not None:
        tensor, event = item
        event.synchronize()
        total = tensor.sum().item()
        with lock:
            order.append(("used", total, emulator.now_ns()))
    done.put("consumed")

for _ in range(2):
    threads = [threading.Thread(target=work) for work in (produce, consume)]
    for thread in threads:
        thread.start()
    done.get(timeout=100)
    for thread in threads:
        thread.join()

layer = torch.nn.Linear(32, 32).cuda()
def step(i):
    layer(torch.full((4, 32), float(i), device="cuda")).sum().backward()
    emulator.advance(1000 * i)
    order.append(("step", i, emulator.now_ns()))
    return i
with ThreadPoolExecutor(2) as pool:
    order.append(list(pool.map(step, range(6))))
event = threading.Event()
order.append(event.wait(0.25))
order.append(emulator.now_ns())
"""


def run_clocked(code: str, *arguments: str, **options: object) -> dict[str, object]:
    """Run code with the clock on; it prints JSON last."""
    settings = {"hazards": "raise", **options}
    prelude = _PRELUDE.replace("**OPTIONS", f"**{settings!r}")
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith("SPILLOVER_EMULATOR")},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


@contextmanager
def cpu_load() -> Iterator[None]:
    """Keep every processor busy."""
    burn = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_same_nanoseconds_in_every_run() -> None:
    program = (
        _STEP
        + _THREADS
        + """
report = emulator.clock_report()
print(json.dumps({"ends": ends, "order": order, "makespan": report.makespan_ns,
    "threads": report.threads_ns, "unseen": report.unseen_waits,
    "operations": [(s.name, s.ns, s.count) for s in report.operations]}))
"""
    )
    first = run_clocked(program)
    with cpu_load():
        second = run_clocked(program)
    assert first == second
    assert first["unseen"] == 0
    kinds = [entry[0] for entry in first["order"] if isinstance(entry, list) and entry[0] != 0]  # type: ignore[attr-defined]
    # The producer runs ahead of the consumer by the length of the queue only.
    assert kinds.index("used") < len(kinds) - 8


@pytest.mark.soak
def test_threads_that_torch_starts_change_nothing(tmp_path: Path) -> None:
    program = """
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, TensorDataset
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(64, 10).cuda(), device_ids=[0])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        data = TensorDataset(torch.randn(64, 64), torch.randint(10, (64,)))
        # Gloo's threads give their pinned buffers back when they get to it. With enough of them
        # from the start, none is pinned (which takes time) because a thread was slow.
        sizes = [1 << i for i in range(15) for _ in range(8)]
        spare = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        del spare
        ends = []
        for workers, pinned in ((2, False), (0, True)):
            loader = DataLoader(data, 8, num_workers=workers, pin_memory=pinned)
            for inputs, labels in loader:
                inputs, labels = (value.cuda(non_blocking=True) for value in (inputs, labels))
                loss = F.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ends.append(emulator.now_ns())
        report = emulator.clock_report()
        dist.destroy_process_group()
        print(json.dumps({"ends": ends, "makespan": report.makespan_ns,
            "threads": report.threads_ns, "resources": [use.busy_ns for use in report.resources],
            "waits": [(wait.name, wait.ns) for wait in report.host_waits]}))
    """
    first = run_clocked(program, str(tmp_path / "first"), hazards="warn")
    with cpu_load():
        second = run_clocked(program, str(tmp_path / "second"), hazards="warn")
    assert first == second


def test_a_condition_is_held_again_before_the_device_starts() -> None:
    found = run_clocked(
        """
        import threading, time
        condition, state = threading.Condition(), []
        def notify():
            with condition:
                state.append("notified")
                condition.notify()
                time.sleep(0.1)
                state.append("released")
        with condition:
            thread = threading.Thread(target=notify)
            thread.start()
            condition.wait()
            seen = list(state)
        thread.join()
        print(json.dumps({"seen": seen}))
        """
    )
    assert found["seen"] == ["notified", "released"]


def test_operators_cost_what_the_formulas_say() -> None:
    found = run_clocked(
        """
        def times(work):
            before = {s.name: s.ns for s in emulator.clock_report().operations}
            work()
            after = {s.name: s.ns for s in emulator.clock_report().operations}
            return {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
        new = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        a, b, bias = new(300, 1000), new(1000, 200), new(200)
        x, w = new(2, 16, 20, 20), new(32, 16, 3, 3)
        depth = new(16, 1, 3, 3)
        q = new(2, 4, 256, 64)
        table, index = new(5000, 128), torch.arange(100, device="cuda")
        big = new(48 << 20)
        from torch.nn.attention import SDPBackend, sdpa_kernel
        def attend(**options):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                F.scaled_dot_product_attention(q, q, q, **options)
        results = {
            "mm": times(lambda: a @ b),
            "addmm": times(lambda: torch.addmm(bias, a, b)),
            "bmm": times(lambda: torch.bmm(q[0], q[1].transpose(1, 2))),
            "conv": times(lambda: F.conv2d(x, w, padding=1)),
            "depthwise": times(lambda: F.conv2d(x, depth, padding=1, groups=16)),
            "attention": times(attend),
            "causal": times(lambda: attend(is_causal=True)),
            "add": times(lambda: big.add(big)),
            "add_": times(lambda: big.add_(1)),
            "zero_": times(lambda: big.zero_()),
            "embedding": times(lambda: F.embedding(index, table)),
            "view": times(lambda: big.view(-1, 4).t()),
            "expanded": times(lambda: torch.empty(1, device="cuda").expand(1 << 20).sum()),
        }
        print(json.dumps(results))
        """
    )
    gpu = emulator.load_profile("rtx4090").gpu.sustained()
    bf16 = "bf16"
    q = {"batch": 2, "heads": 4, "kv_heads": 4, "queries": 256, "keys": 256, "head_dim": 64}
    conv = {"n": 2, "height": 20, "width": 20, "stride": (1, 1), "padding": (1, 1)}
    wanted = {
        "mm": costs.matmul_ns(gpu, costs.MatmulShape(m=300, n=200, k=1000), bf16),
        "addmm": costs.matmul_ns(gpu, costs.MatmulShape(m=300, n=200, k=1000), bf16),
        "bmm": costs.matmul_ns(gpu, costs.MatmulShape(m=256, n=256, k=64, batch=4), bf16),
        "conv": costs.convolution_ns(
            gpu,
            costs.ConvolutionShape(channels=16, filters=32, kernel=(3, 3), groups=1, **conv),
            "forward",
            bf16,
        ),
        "depthwise": costs.bytes_bound_ns(gpu, 2 * (2 * 2 * 16 * 400 + 16 * 9)),
        "attention": costs.attention_ns(
            gpu, costs.AttentionShape(causal=False, **q), "forward", bf16
        ),
        "causal": costs.attention_ns(gpu, costs.AttentionShape(causal=True, **q), "forward", bf16),
        "add": costs.bytes_bound_ns(gpu, 3 * 96 << 20),
        "add_": costs.bytes_bound_ns(gpu, 2 * 96 << 20),
        "zero_": costs.bytes_bound_ns(gpu, 96 << 20),
        "embedding": costs.bytes_bound_ns(gpu, 2 * 100 * 128 * 2 + 800),
        "view": 0,
        "expanded": costs.bytes_bound_ns(gpu, 8),
    }
    for name, expected in wanted.items():
        taken = sum(found[name].values())  # type: ignore[attr-defined]
        assert abs(taken - expected) <= 1, (name, found[name], expected)


def test_a_graph_costs_what_its_operators_cost() -> None:
    found = run_clocked(
        """
        def measure(work):
            before = {s.name: (s.ns, s.count) for s in emulator.clock_report().operations}
            start = emulator.now_ns()
            work()
            torch.cuda.synchronize()
            taken = emulator.now_ns() - start
            after = {s.name: (s.ns, s.count) for s in emulator.clock_report().operations}
            zero = (0, 0)
            costs = {name: [new - old for new, old in zip(total, before.get(name, zero))]
                     for name, total in after.items() if total != before.get(name)}
            return {"ns": taken, "operations": costs}
        nn = torch.nn
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        model.cuda()
        x = torch.randn(32, 64, device="cuda")
        host = torch.zeros(32, 64).pin_memory()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        def step():
            x.copy_(host, non_blocking=True)
            model.zero_grad(set_to_none=False)
            model(x.t().contiguous().t()).sum().backward()
        with torch.cuda.stream(side):
            step()
            eager = measure(step)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            step()
            graph.capture_end()
            replays = [measure(graph.replay) for _ in range(2)]
        print(json.dumps({"eager": eager, "replays": replays}))
        """
    )
    eager, replays = found["eager"], found["replays"]
    for name in ("aten::addmm", "aten::copy_", "memcpy host-to-device"):
        assert name in eager["operations"]  # type: ignore[index]
    for replay in replays:  # type: ignore[attr-defined]
        assert replay["operations"] == eager["operations"]  # type: ignore[index]
        assert replay["ns"] < eager["ns"] / 2  # type: ignore[index]
    kernels_ns = sum(ns for ns, _ in eager["operations"].values())  # type: ignore[index]
    assert replays[0]["ns"] > kernels_ns  # type: ignore[index]


def test_backward_and_other_passes_take_time(tmp_path: Path) -> None:
    found = run_clocked(
        """
        x = torch.zeros(4, 8, 64, 64, device="cuda", requires_grad=True)
        conv = torch.nn.Conv2d(8, 16, 3).cuda()
        conv(x).sum().backward()
        q = torch.zeros(1, 2, 128, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        rnn = torch.nn.LSTM(8, 8).cuda()
        rnn(torch.zeros(3, 2, 8, device="cuda"))[0].sum().backward()
        dense = torch.eye(8, device="cuda").to_sparse()
        torch.sparse.mm(dense, torch.ones(8, 8, device="cuda"))
        torch.optim.AdamW(conv.parameters(), fused=True).step()
        print(json.dumps({s.name: s.ns for s in emulator.clock_report().operations}))
        """
    )
    for name in ("convolution_backward", "attention_backward", "_thnn_fused_lstm", "_fused_adamw"):
        assert any(name in key and ns > 0 for key, ns in found.items()), (name, found)  # type: ignore[operator]


def test_user_timings_are_simulated() -> None:
    found = run_clocked(
        """
        a = torch.zeros(1024, 1024, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(100):
            a @ a
        end.record()
        polls = 0
        while not end.query():
            polls += 1
        report = emulator.clock_report()
        mm = next(s for s in report.operations if s.name == "aten::mm")
        before = emulator.now_ns()
        emulator.advance(123)
        emulator.busy("cpu-optimizer", ns=1000)
        emulator.busy("disk-read", bytes=1 << 20)
        after = emulator.now_ns()
        print(json.dumps({"ms": start.elapsed_time(end), "mm": mm.ns, "polls": polls,
                          "host": after - before}))
        """
    )
    assert found["ms"] * 1e6 >= found["mm"] > 0  # type: ignore[operator]
    disk = emulator.load_profile("rtx4090").disk
    assert found["host"] == 123 + 1000 + costs.disk_ns(disk, 1 << 20, "read")


def test_a_wait_that_nobody_sees_passes_the_turn_on() -> None:
    found = run_clocked(
        """
        import os, threading, queue
        x = torch.ones(8, device="cuda")
        incoming, outgoing = os.pipe()
        def answer():
            os.write(outgoing, bytes([int(x.sum().item())]))
        thread = threading.Thread(target=answer)
        thread.start()
        value = os.read(incoming, 1)[0]  # holds on to its turn
        thread.join()
        times_out = None
        try:
            queue.Queue().get(timeout=0.05)
        except queue.Empty:
            times_out = True
        print(json.dumps({"value": value, "times_out": times_out,
                          "unseen": emulator.clock_report().unseen_waits}))
        """
    )
    assert found == {"value": 8, "times_out": True, "unseen": 1}


def test_what_a_hook_waits_for_in_backward_is_seen() -> None:
    found = run_clocked(
        """
        import queue, threading
        asked, answered = queue.Queue(), queue.Queue()

        def serve():
            while asked.get():
                emulator.advance(5_000_000)
                answered.put(1)

        server = threading.Thread(target=serve)
        server.start()
        weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
        weight.register_hook(lambda _: (asked.put(True), answered.get())[0])
        start = emulator.now_ns()
        for _ in range(3):
            (weight * 2).sum().backward()
        waited = emulator.now_ns() - start
        asked.put(False)
        server.join()
        print(json.dumps({"waited": waited, "unseen": emulator.clock_report().unseen_waits}))
        """
    )
    assert found["unseen"] == 0
    # The server may be a little behind at the start.
    assert 14_900_000 <= found["waited"] < 18_000_000  # type: ignore[operator]


def test_mistakes_are_sentences() -> None:
    found = run_clocked(
        """
        from spillover import ConfigError
        messages = []
        for mistake in (lambda: emulator.busy("gpu", ns=1), lambda: emulator.advance(-1),
                        lambda: emulator.busy("disk-read", bytes=-1)):
            try:
                mistake()
            except ConfigError as error:
                messages.append(str(error))
        print(json.dumps({"messages": messages}))
        """
    )
    assert len(found["messages"]) == 3  # type: ignore[arg-type]
    if "torch" in sys.modules and emulator.is_enabled():
        with pytest.raises(Exception, match="the virtual clock is off"):
            emulator.now_ns()


def test_our_disk_and_optimizer_take_virtual_time(tmp_path: Path) -> None:
    found = run_clocked(
        """
        from spillover._core import DiskStore
        from spillover import optim
        store = DiskStore([sys.argv[1]])
        host = torch.zeros(4 << 20, dtype=torch.uint8).pin_memory()
        source = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
        host.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        start = emulator.now_ns()
        payload, ticket = store.write(host.numpy(), after=event)
        submitted = emulator.now_ns()
        ticket.wait()
        written = emulator.now_ns()
        store.read(payload, host.numpy()).wait()
        read = emulator.now_ns()
        store.close()
        layer = torch.nn.Linear(64, 64).cuda()
        layer(torch.ones(2, 64, device="cuda")).sum().backward()
        optim.AdamW(layer.parameters()).step()
        report = emulator.clock_report()
        print(json.dumps({"submitted": submitted - start, "written": written - start,
            "read": read - written, "busy": {use.name: use.busy_ns for use in report.resources},
            "hazards": emulator.hazards()}))
        """,
        str(tmp_path),
    )
    profile = emulator.load_profile("rtx4090")
    size = 4 << 20
    assert found["submitted"] == 0
    copied = costs.copy_ns(profile.gpu, size, "to_host")
    assert found["written"] >= copied + costs.disk_ns(profile.disk, size, "write")  # type: ignore[operator]
    assert found["read"] == costs.disk_ns(profile.disk, size, "read")
    assert found["busy"]["cpu-optimizer"] > 0  # type: ignore[index]
    assert found["hazards"] == []


def test_our_allocators_wait_for_memory_takes_virtual_time() -> None:
    """What another stream uses is asked for again and again; between the questions time passes."""
    found = run_clocked(
        """
        import spillover
        spillover.allocator.install()
        side = torch.cuda.Stream()
        used = torch.empty(768 << 20, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(side):
            for _ in range(100):
                used.add_(1)
            used.record_stream(side)
        del used
        with emulator.faults():
            before = emulator.now_ns()
            torch.empty(768 << 20, dtype=torch.uint8, device="cuda")
            waited_ms = (emulator.now_ns() - before) / 1e6
            asked = emulator.calls()["cuEventQuery"]
        print(json.dumps({"asked": asked, "waited_ms": waited_ms, "is_done": side.query()}))
        """,
        dry=True,
    )
    assert found["is_done"]
    assert found["waited_ms"] > 100  # type: ignore[operator]
    # Each question is followed by a pause of a millisecond, but for the first few.
    assert 3 < found["asked"] < found["waited_ms"], found  # type: ignore[operator]


def test_our_commits_take_virtual_time(tmp_path: Path) -> None:
    found = run_clocked(
        """
        from spillover._core import DurableStore
        torch.ones(1, device="cuda").item()
        store = DurableStore([sys.argv[1] + "/a", sys.argv[1] + "/b"],
            [("weights", 8 << 20), ("flag", 1)], extent_bytes=4 << 20)
        store.write("weights", bytes(8 << 20)).wait()
        start = emulator.now_ns()
        store._commit(b"", 0)
        committed = emulator.now_ns()
        store.verify()
        verified = emulator.now_ns()
        store._commit(b"", 0)
        print(json.dumps({"committed": committed - start, "verified": verified - committed,
            "again": emulator.now_ns() - verified}))
        """,
        str(tmp_path),
    )
    disk = emulator.load_profile("rtx4090").disk
    flush, block = (costs.disk_ns(disk, size, "write") for size in (0, 4096))
    assert flush == disk.write_latency_us * 1000
    # The manifest, two folders, and twice a record; the second time no extent was written.
    assert found["committed"] == block + 2 * flush + 2 * (block + flush)
    assert found["again"] == block + flush + 2 * (block + flush)
    assert found["verified"] == 2 * costs.disk_ns(disk, 4 << 20, "read")


def test_trace_and_summary_of_a_script(tmp_path: Path) -> None:
    script, trace = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text(
        "import subprocess, sys\n"
        "import torch, torch.nn.functional as F\n"
        "from spillover import emulator\n" + _STEP + "side = torch.cuda.Stream()\n"
        "with torch.cuda.stream(side):\n"
        "    torch.ones(1 << 16).pin_memory().to('cuda', non_blocking=True)\n"
        "torch.cuda.current_stream().wait_stream(side)\n"
        "tokens + 1\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
    )
    command = [
        *[sys.executable, "-m", "spillover", "emulate", "--profile", "rtx4090"],
        *["--trace", str(trace), "--vram", "1GiB", "--hazards", "raise", "--", "python"],
        str(script),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("simulated time on rtx4090") == 2
    assert len(list(tmp_path.glob("out*.json"))) == 2  # the child's has its number
    contents = json.loads(trace.read_text())
    events, makespan = contents["traceEvents"], int(contents["otherData"]["makespan_ns"])
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["ph"] for event in events} >= {"X", "M", "s", "f", "C"}
    assert all(
        span["ts"] >= 0 and (span["ts"] + span["dur"]) * 1000 <= makespan + 1 for span in spans
    )
    # Every resource does one thing at a time, and their sum is what the summary says.
    compute = sorted(
        (span["ts"], span["dur"])
        for span in spans
        if span["pid"] == 3 and span["args"]["resource"] == "compute"
    )
    for (start, duration), (following, _) in itertools.pairwise(compute):
        assert start + duration <= following + 1e-6
    busy_ms = sum(duration for _, duration in compute) / 1000
    summary = re.findall(r"compute of cuda:0: busy ([0-9.]+) ms", result.stderr)
    assert f"{busy_ms:.3f}" in summary


def test_what_limits_a_stretch_of_time() -> None:
    report = run_clocked(
        """
        from spillover.emulator._dry_times import limits

        wide = torch.zeros(2048, 2048, dtype=torch.bfloat16, device="cuda")
        large = torch.zeros(16 << 20, device="cuda")
        small = torch.zeros(8, device="cuda")
        host = torch.zeros(16 << 20, pin_memory=True)

        def repeat(count, function):
            for _ in range(count):
                function()

        def limit(function):
            torch.cuda.synchronize()
            start = emulator.now_ns()
            function()
            torch.cuda.synchronize()
            return limits(start, emulator.now_ns())

        print(json.dumps({
            "compute": limit(lambda: repeat(10, lambda: wide @ wide)),
            "memory bandwidth": limit(lambda: repeat(4, lambda: large.mul_(2))),
            "copies to the device": limit(lambda: large.copy_(host, non_blocking=True)),
            "copies to the host": limit(lambda: host.copy_(large, non_blocking=True)),
            "CPU optimizer": limit(lambda: emulator.busy("cpu-optimizer", bytes=1 << 30)),
            "disk reads": limit(lambda: emulator.busy("disk-read", bytes=1 << 30)),
            "host: Python and launches": limit(lambda: repeat(99, lambda: small.add_(1))),
        }))
        """
    )
    for name, shares in report.items():
        assert next(iter(shares)) == name, (name, shares)
        assert shares[name] > 0.75
        assert sum(shares.values()) == pytest.approx(1)


def test_cpu_operators_take_time_by_their_bytes() -> None:
    report = run_clocked(
        """
        torch.cuda.synchronize()
        size = 1 << 22
        tensor, other = torch.ones(size), torch.ones(size)
        weights = [torch.ones(size, requires_grad=True) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.ones(size)
        optimizer = torch.optim.AdamW(weights, fused=True)
        optimizer.step()

        def taken(function):
            start = emulator.now_ns()
            function()
            return emulator.now_ns() - start

        print(json.dumps({
            "sum": taken(lambda: torch.add(tensor, other)),
            "in place": taken(lambda: tensor.mul_(2)),
            "list": taken(lambda: torch._foreach_mul_([tensor, other], 2.0)),
            "small": taken(lambda: tensor[:1000].mul_(2)),
            "optimizer": taken(optimizer.step),
            "busy": {use.name: use.bytes for use in emulator.clock_report().resources},
        }))
        """
    )
    bytes_each, profile = 4 << 22, emulator.load_profile("rtx4090").host
    assert report["sum"] == pytest.approx(3 * bytes_each / profile.memory_bandwidth_gb_s, rel=1e-6)
    assert report["in place"] == pytest.approx(report["sum"] * 2 / 3, abs=2)
    assert report["list"] == pytest.approx(2 * report["in place"], abs=2)
    assert report["small"] == 0
    passes = 2 * 7 * bytes_each
    assert report["optimizer"] == pytest.approx(passes / profile.optimizer_bandwidth_gb_s, rel=0.01)
    assert report["busy"]["cpu-optimizer"] == pytest.approx(2 * passes, rel=1e-3)


def test_critical_path_goes_through_a_copy_beside_many_kernels() -> None:
    report = run_clocked(
        """
        host = torch.zeros(32 << 20, pin_memory=True)
        small = torch.zeros(8, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            large = host.to("cuda", non_blocking=True)
            arrived = side.record_event()
        for _ in range(200):
            small.add_(1)
        torch.cuda.current_stream().wait_event(arrived)
        large.mul_(2)
        torch.cuda.synchronize()
        report = emulator.clock_report()
        print(json.dumps({
            "path": [(share.name, share.ns) for share in report.critical_path],
            "is_whole": report.critical_path_is_whole,
            "makespan": report.makespan_ns,
        }))
        """
    )
    path = dict(report["path"])  # type: ignore[call-overload]
    assert report["is_whole"]
    assert path["memcpy host-to-device"] > 128 << 20 >> 5  # at less than 32 bytes a nanosecond
    assert "aten::add_.Scalar" not in path
    assert sum(path.values()) == pytest.approx(report["makespan"], rel=0.01)
