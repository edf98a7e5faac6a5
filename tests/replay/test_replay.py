"""Replays: what is measured, on every allocator, and what the command line says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spillover import ConfigError
from spillover.replay import (
    ALLOCATORS,
    PRICES,
    Allocator,
    ReplayOptions,
    plot,
    priced_ms,
    read_trace,
    replay,
)
from spillover.replay._measure import worker_environment

MIB = 1 << 20
#: Three live blocks at most, two streams, two threads that take turns.
MIXED = f"""op,id,bytes,stream,thread
alloc,a,{64 * MIB},0,1
alloc,b,{32 * MIB},0x10,2
record_stream,b,,0x20,1
alloc,c,1000,,2
alloc,empty,0,,1
free,b,,,1
free,empty,,,2
free,c,,,2
alloc,d,{8 * MIB},0x20,1
free,a,,,2
"""


def written(tmp_path: Path, text: str = MIXED) -> Path:
    path = tmp_path / "mixed.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_replay_measures_what_the_driver_saw(tmp_path: Path, allocator: Allocator) -> None:
    trace = read_trace(written(tmp_path))
    found = replay(trace, allocator, ReplayOptions(vram="1GiB"))
    assert (found.event_count, found.failed_at, found.error) == (10, None, "")
    assert found.peak_bytes == 96 * MIB + 1000
    assert found.peak_bytes <= found.reserved_peak_bytes < 200 * MIB
    assert found.utilisation == found.peak_bytes / found.reserved_peak_bytes
    assert max(found.reserved_bytes) <= found.reserved_peak_bytes
    held = sum(found.driver_bytes.get(name, 0) for name in ("cuMemAlloc", "cuMemCreate"))
    assert held >= found.reserved_peak_bytes
    assert set(found.driver_calls) <= set(PRICES)
    assert found.priced_ms >= found.priced_by_call_ms > 0
    assert found.alloc_ns["p50"] <= found.alloc_ns["p99"] <= found.alloc_ns["p100"]


def test_a_pool_without_virtual_memory_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPILLOVER_ALLOCATOR", "virtual_memory=off")
    found = replay(read_trace(written(tmp_path)), "ours", ReplayOptions(vram="1GiB"))
    assert (found.failed_at, found.error) == (None, "")
    assert found.driver_calls["cuMemAlloc"] == 4
    assert "cuMemCreate" not in found.driver_calls
    # Two exact chunks, one of 20 MiB and one of 2 MiB.
    assert found.reserved_peak_bytes == (64 + 32 + 20 + 2) * MIB


def test_native_and_expandable_are_what_their_names_say(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path))
    native, expandable = (
        replay(trace, allocator, ReplayOptions(vram="1GiB"))
        for allocator in ("native", "expandable")
    )
    assert "cuMemCreate" not in native.driver_calls
    assert native.driver_calls["cuMemAlloc"] > 0
    assert expandable.driver_calls["cuMemCreate"] > 0


def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path))
    for allocator in ("ours", "native"):
        found = replay(trace, allocator, ReplayOptions(vram="80MiB"))
        assert found.failed_at == found.event_count == 1
        assert "out of memory" in found.error.lower()


def test_configuration_of_the_caller_does_not_reach_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:20")
    monkeypatch.setenv("SPILLOVER_EMULATOR", "1")
    assert not any(
        name.startswith(("PYTORCH_", "SPILLOVER_EMULATOR")) for name in worker_environment("native")
    )
    assert worker_environment("expandable")["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_prices_by_page_and_by_call() -> None:
    calls = {"cuMemCreate": 2, "cuEventRecord": 3, "cuCtxGetCurrent": 1000}
    pages = {"cuMemCreate": 20 * MIB}
    assert priced_ms(calls, pages, per="call") == pytest.approx((2 * 193 + 3) / 1e3)
    assert priced_ms(calls, pages, per="page") == pytest.approx((10 * 193 + 3) / 1e3)
    small = priced_ms({"cuMemMap": 4}, {"cuMemMap": 4096}, per="page")
    assert small == pytest.approx(4 * 1.45 / 1e3)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path))
    with pytest.raises(ConfigError, match="allocator 'rmm' is not one of ours, native, exp"):
        replay(trace, "rmm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vram="):
        ReplayOptions(vram="much")


def test_picture_is_drawn(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path))
    found = replay(trace, "ours", ReplayOptions(vram="80MiB"))
    plot([(trace, [found])], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        plot([(trace, [found])], tmp_path / "picture.mp3")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spillover", "replay", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )


def test_command_prints_and_writes(tmp_path: Path) -> None:
    result = command(
        written(tmp_path), "--on", "ours", "--vram", "1GiB", "--json", tmp_path / "out.json"
    )
    assert result.returncode == 0, result.stderr
    for words in ("utilisation", "mixed: 10 events on an emulated device", "96.00 MiB", "by page"):
        assert words in result.stdout
    (found,) = json.loads((tmp_path / "out.json").read_text())["replays"]
    assert found["trace"] == "mixed"
    assert found["allocator"] == "ours"


def test_the_exit_code_tells_of_an_allocator_that_failed(tmp_path: Path) -> None:
    """The pool puts pieces together for a block that PyTorch's own allocator has no room for."""
    pieces = [f"alloc,{number},{20 * MIB}\n" for number in range(3)]
    lines = [f"alloc,first,{60 * MIB}\n", "free,first\n", *pieces, "free,0\n", "free,2\n"]
    lines.append(f"alloc,whole,{40 * MIB}\n")
    path = written(tmp_path, "op,id,bytes\n" + "".join(lines))
    found = tmp_path / "out.json"
    picture = tmp_path / "out.png"
    result = command(path, "--vram", "80MiB", "--json", found, "--plot", picture)
    assert result.returncode == 3, result.stderr
    assert result.stderr == ""
    assert "native failed at event 7: " in result.stdout
    assert "ours failed" not in result.stdout
    assert "peak held" in result.stdout
    failed_at = {
        one["allocator"]: one["failed_at"] for one in json.loads(found.read_text())["replays"]
    }
    assert failed_at == {"ours": None, "native": 7, "expandable": None}
    assert picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "both"), "--on 'both' is not one of ours, native, expandable and all"),
        (("--json", "nowhere/x.json"), "there is no folder"),
        (("--json", "."), "'.' is a folder"),
        (("--plot", "."), "'.' is a folder"),
        (("--plot", "x.mp3"), "'x.mp3' cannot be written: the format 'mp3' is not one of"),
        (("--vram", "lots"), "vram='lots' is not a size"),
        (("--device", "0", "missing.csv"), "missing.csv: cannot be read"),
    ],
)
def test_command_says_what_is_wrong(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = command(written(tmp_path), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == "", "nothing was replayed"


@pytest.mark.gpu
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_replay_on_a_gpu(tmp_path: Path, allocator: Allocator) -> None:
    trace = read_trace(written(tmp_path))
    found = replay(trace, allocator)
    assert not found.is_emulated
    assert found.failed_at is None
    assert found.driver_calls == {}
    assert found.peak_bytes <= found.reserved_peak_bytes < 200 * MIB
