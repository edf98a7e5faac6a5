"""Programs that end, fail or fork with transfers in flight, and programs with several devices."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

#: An engine of each kind with transfers of every kind under way.
PRELUDE = """
import os, sys, torch
from spillover import DiskStore, StateError, TransferEngine
store = DiskStore(sys.argv[1])
KIB = 1 << 10
engines = [
    TransferEngine(chunk="64KiB", staging="256KiB"),
    TransferEngine(chunk="64KiB", staging="256KiB", host=0, disk=store),
]
held = []
for engine in engines:
    for seed in range(4):
        source = torch.full((300 * KIB,), seed, dtype=torch.uint8, device="cuda")
        payload, ticket = engine.put(source)
        target = torch.empty_like(source)
        held.append((payload, ticket, target, engine.fetch(payload, target)))
"""


def program(body: str) -> str:
    return PRELUDE + textwrap.dedent(body)


@pytest.mark.parametrize(
    ("ending", "schedule"),
    [
        pytest.param("", "late", marks=pytest.mark.soak),
        ("", "threaded"),
        pytest.param("del engine, engines", "late", marks=pytest.mark.soak),
        ("held.append(held); sys.exit(0)", "late"),
        pytest.param("globals().clear()", "late", marks=pytest.mark.soak),
        ("import threading; threading.Thread(target=held[5][3].wait).start()", "threaded"),
    ],
)
def test_exit_with_transfers_in_flight(
    ending: str, schedule: str, run_emulated: Run, tmp_path: Path
) -> None:
    result = run_emulated(program(ending), str(tmp_path), schedule=schedule)
    assert result.stderr == ""


def test_exception_with_transfers_in_flight(run_emulated: Run, tmp_path: Path) -> None:
    result = run_emulated(program("raise KeyError('mine')"), str(tmp_path), check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "KeyError: 'mine'"
    assert "spillover" not in result.stderr.replace("import spillover", "")


def test_interrupt_with_transfers_in_flight(run_emulated: Run, tmp_path: Path) -> None:
    # What runs the tests may ignore the signal, which a child inherits.
    code = program(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    result = run_emulated(code, str(tmp_path), check=False)
    assert result.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_exit_at_once_leaves_nothing(run_emulated: Run, tmp_path: Path) -> None:
    run_emulated(program("os._exit(0)"), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_fork_with_transfers_in_flight(run_emulated: Run, tmp_path: Path) -> None:
    """The child's calls are errors, its end disturbs nobody, and the parent goes on."""
    code = program("""
        child = os.fork()
        if child == 0:
            payload, ticket, target, arriving = held[-1]
            for refused in (
                ticket.done, ticket.wait, arriving.cancel, engine.stats, engine.synchronize,
                engine.collect, lambda: payload.state, lambda: engine.advance(1),
                lambda: ticket.is_cancelled,
            ):
                try:
                    refused()
                except StateError as error:
                    assert "forked child" in str(error)
                else:
                    os._exit(3)
            payload.drop()
            engine.close()
            del payload, ticket, target, arriving, engine
            engines.clear()
            held.clear()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for index, (payload, ticket, target, arriving) in enumerate(held):
            arriving.wait()
            assert target.eq(index % 4).all()
    """)
    run_emulated(code, str(tmp_path))


def test_data_loader_workers_forked_while_copies_run(run_emulated: Run, tmp_path: Path) -> None:
    code = program("""
        from torch.utils.data import DataLoader, TensorDataset
        data = TensorDataset(torch.arange(64))
        seen = 0
        for _ in range(2):
            for (batch,) in DataLoader(data, batch_size=8, num_workers=2):
                seen += int(batch.sum())
                payload, _ = engine.put(batch.to("cuda"))
                target = torch.empty(8, dtype=torch.int64, device="cuda")
                engine.fetch(payload, target).stream_wait()
                assert torch.equal(target.cpu(), batch)
        assert seen == 2 * sum(range(64))
        for index, (payload, ticket, target, arriving) in enumerate(held):
            arriving.wait()
            assert target.eq(index % 4).all()
    """)
    run_emulated(code, str(tmp_path), schedule="threaded")


def test_several_devices(run_emulated: Run, tmp_path: Path) -> None:
    code = """
        import sys, torch
        from spillover import ConfigError, DiskStore, StateError, TransferEngine
        store = DiskStore(sys.argv[1])
        engines = [
            TransferEngine(device=device, chunk="64KiB", staging="128KiB", host=0, disk=store)
            for device in range(3)
        ]
        sources = [
            torch.arange(100_000, device=f"cuda:{device}", dtype=torch.int32) * (device + 1)
            for device in range(3)
        ]
        payloads = [engine.put(source)[0] for engine, source in zip(engines, sources)]
        targets = [torch.empty_like(source) for source in sources]
        for engine, payload, target in zip(engines, payloads, targets):
            engine.fetch(payload, target).stream_wait()
        for target, source in zip(targets, sources):
            assert torch.equal(target, source)
        try:
            engines[0].put(sources[1])
        except ConfigError as error:
            assert "cuda:1" in str(error) and "cuda:0" in str(error)
        else:
            raise AssertionError("a tensor of another device was taken")
        try:
            engines[0].fetch(payloads[1], targets[0])
        except StateError as error:
            assert "another engine" in str(error)
        else:
            raise AssertionError("another engine's payload was taken")
    """
    run_emulated(code, str(tmp_path), devices=3)


def test_figures_are_asked_for_while_the_engine_lets_go_of_tensors(
    run_emulated: Run, tmp_path: Path
) -> None:
    """The engine's thread must not ask for the interpreter's lock with its own mutex held."""
    code = program("""
        for payload, ticket, target, arriving in held:
            arriving.wait()
        payload = held[-1][0]
        for _ in range(300):
            arriving = engine.fetch(payload, torch.empty_like(held[-1][2]))
            while not arriving.done():
                engine.stats()
                payload.state
    """)
    run_emulated(code, str(tmp_path), schedule="threaded")
