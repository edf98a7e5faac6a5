"""Simulated time of PyTorch programs is the sum of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from clocked import run_clocked

from spillover import emulator
from spillover.emulator import costs


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
