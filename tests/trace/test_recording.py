"""``spillover.trace``: files of a block, of a run, and together with torch.profiler's."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chrome_format
from spillover import ConfigError, StateError, _core, trace


@pytest.fixture(autouse=True)
def off_before_and_after() -> Iterator[None]:
    assert not trace.is_recording()
    yield
    assert not trace.is_recording()


def count(path: Path, name: str) -> int:
    return len(chrome_format.spans(chrome_format.read(path), name))


def test_record_writes_what_happens_within(tmp_path: Path) -> None:
    with trace.span("before"):
        pass
    with trace.record(tmp_path / "out.json"):
        assert trace.is_recording()
        for _ in range(3):
            with trace.span("outer"), trace.span("inner"):
                pass
    found = chrome_format.read(tmp_path / "out.json")
    outer, inner = (chrome_format.spans(found, name) for name in ("outer", "inner"))
    assert len(outer) == len(inner) == 3
    for one, within in zip(outer, inner, strict=True):
        assert one["ts"] <= within["ts"]
        assert one["ts"] + one["dur"] >= within["ts"] + within["dur"]
    assert chrome_format.spans(found, "before") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_an_exception_is_passed_on_and_the_file_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError), trace.record(tmp_path / "out.json"), trace.span("failing"):
        raise KeyError
    assert count(tmp_path / "out.json", "failing") == 1


def test_each_recording_has_its_own_time(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with trace.record(first):
        with trace.span("a"):
            pass
        with trace.record(second), trace.span("b"):
            pass
        with trace.span("c"):
            pass
    assert [count(first, name) for name in "abc"] == [1, 1, 1]
    assert [count(second, name) for name in "abc"] == [0, 1, 0]


def test_start_stop_and_save(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not started"):
        trace.stop()
    trace.start(events_max=64)
    with pytest.raises(StateError, match="started before"):
        trace.start()
    with trace.span("one"):
        pass
    assert trace.save(tmp_path / "during.json") == tmp_path / "during.json"
    with trace.span("two"):
        pass
    trace.stop()
    with trace.span("three"):
        pass
    trace.save(tmp_path / "after.json.gz")
    assert [count(tmp_path / "during.json", name) for name in ("one", "two")] == [1, 0]
    assert [count(tmp_path / "after.json.gz", name) for name in ("one", "two", "three")] == [
        1,
        1,
        0,
    ]


def test_what_was_dropped_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trace.record(tmp_path / "out.json", events_max=16):
        for _ in range(20):
            with trace.span("many"):
                pass
    assert count(tmp_path / "out.json", "many") == 16
    assert "4 older ones were dropped" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "must be the path"), ("missing/out.json", "no folder"), (".", "is a folder")],
)
def test_a_place_that_cannot_be_is_named_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message), trace.record(path):
        pytest.fail("this must not run")


def _fail_without(folder: Path) -> None:
    folder.rmdir()
    raise KeyError


def test_a_file_that_cannot_be_written_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError), trace.record(folder / "out.json"):
        folder.rmdir()
    folder.mkdir()
    with pytest.raises(KeyError), trace.record(folder / "out.json"):
        _fail_without(folder)


def test_spillover_0_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPILLOVER", "0")
    trace.start()
    with trace.record(tmp_path / "out.json"):
        assert not trace.is_recording()
    trace.stop()
    assert list(tmp_path.iterdir()) == []


def run(code: str, *, expect: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr


SPAN = """
import os, subprocess, sys, spillover
assert "torch" not in sys.modules
with spillover.trace.span("work"):
    pass
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise KeyError", 1), ("sys.exit(3)", 3)],
    ids=["end", "raise", "exit"],
)
def test_a_whole_run(tmp_path: Path, end: str, code: int) -> None:
    run(SPAN + end, expect=code, SPILLOVER_TRACE=str(tmp_path / "out.json"))
    assert count(tmp_path / "out.json", "work") == 1


def test_processes_that_a_run_starts_do_not_write_over_its_file(tmp_path: Path) -> None:
    program = SPAN + "assert not spillover.trace.is_recording()"
    child = f"subprocess.run([sys.executable, '-c', {program!r}], check=True)"
    fork = "if os.fork() == 0: sys.exit(0)\nos.wait()\n"
    for code in (child, fork):
        run(SPAN + code + SPAN, SPILLOVER_TRACE=str(tmp_path / "out.json"))
        assert count(tmp_path / "out.json", "work") == 2


def test_processes_of_a_run_have_files_of_their_own(tmp_path: Path) -> None:
    child = f"subprocess.run([sys.executable, '-c', {SPAN!r}], check=True)"
    run(SPAN + child, SPILLOVER_TRACE=str(tmp_path / "out-%p.json"))
    files = sorted(tmp_path.iterdir())
    assert [count(file, "work") for file in files] == [1, 1]
    trace.merge(tmp_path / "all.json.gz", *files)
    assert count(tmp_path / "all.json.gz", "work") == 2


def test_a_program_that_becomes_another_one_goes_on(tmp_path: Path) -> None:
    code = f"os.execv(sys.executable, [sys.executable, '-c', {SPAN!r}])"
    run(SPAN + code, SPILLOVER_TRACE=str(tmp_path / "out.json"))
    assert count(tmp_path / "out.json", "work") == 1


def test_wrong_settings_of_a_run_are_named(tmp_path: Path) -> None:
    place = str(tmp_path / "missing" / "out.json")
    assert "no folder" in run("import spillover", expect=1, SPILLOVER_TRACE=place)
    good = str(tmp_path / "out.json")
    for events, message in (("many", "SPILLOVER_TRACE_EVENTS"), ("3", "between 16 and")):
        errors = run(
            "import spillover", expect=1, SPILLOVER_TRACE=good, SPILLOVER_TRACE_EVENTS=events
        )
        assert message in errors
    run(SPAN, SPILLOVER_TRACE=place, SPILLOVER="0")


def test_spillover_run_writes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SPAN)
    command = [sys.executable, "-m", "spillover", "run", "--trace"]

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    done = start("out.json", "program.py")
    assert done.returncode == 0, done.stderr
    assert count(tmp_path / "out.json", "work") == 1
    wrong = start("missing/out.json", "program.py")
    assert wrong.returncode == 2
    assert "no folder" in wrong.stderr


def test_a_block_within_a_traced_run(tmp_path: Path) -> None:
    code = f"""
    import spillover
    with spillover.trace.record({str(tmp_path / "block.json")!r}), spillover.trace.span("inside"):
        pass
    assert spillover.trace.is_recording()
    with spillover.trace.span("after"):
        pass
    """
    run(code, SPILLOVER_TRACE=str(tmp_path / "run.json"))
    assert [count(tmp_path / "block.json", name) for name in ("inside", "after")] == [1, 0]
    assert [count(tmp_path / "run.json", name) for name in ("inside", "after")] == [1, 1]


def test_a_profile_of_torch_and_a_trace_of_ours_are_one(tmp_path: Path) -> None:
    import torch

    ours, profile = tmp_path / "ours.json", tmp_path / "profile.json"
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        trace.record(ours),
        trace.span("around"),
        torch.profiler.record_function("of torch"),
    ):
        torch.ones(8, device="cpu").sum()
    profiler.export_chrome_trace(str(profile))
    trace.merge(tmp_path / "both.json", profile, ours)
    both = json.loads((tmp_path / "both.json").read_text())
    found: dict[str, Any] = {event.get("name"): event for event in both["traceEvents"]}
    around, of_torch = found["around"], found["of torch"]
    slack_us = 100_000  # Two clocks, read on a machine that is busy with something else.
    assert around["ts"] - slack_us <= of_torch["ts"]
    assert of_torch["ts"] + of_torch["dur"] <= around["ts"] + around["dur"] + slack_us
    assert around["pid"] == of_torch["pid"] == os.getpid()
    names = [event for event in both["traceEvents"] if event.get("name") == "process_name"]
    (name,) = (event["args"]["name"] for event in names if event["pid"] == os.getpid())
    assert "spillover" not in name


def test_merging_counts_from_the_earliest_beginning(tmp_path: Path) -> None:
    files = []
    for number, base in enumerate((5_000_000_000, 2_000_000_000)):
        event = {"ph": "X", "name": str(number), "ts": 7.0, "dur": 1.0, "pid": 1, "tid": 1}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"baseTimeNanoseconds": base, "traceEvents": [event]}))
    merged = json.loads(trace.merge(tmp_path / "all.json", *files).read_text())
    assert merged["baseTimeNanoseconds"] == 2_000_000_000
    assert {event["name"]: event["ts"] for event in merged["traceEvents"]} == {
        "0": 3_000_007.0,
        "1": 7.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a trace"),
        (b"\x1f\x8bx", "not a trace"),
        (b'{"events": []}', "no traceEvents"),
        (b'{"traceEvents": []}', "baseTimeNanoseconds"),
        (gzip.compress(b"[]"), "baseTimeNanoseconds"),
    ],
)
def test_what_cannot_be_merged_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "in.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        trace.merge(tmp_path / "out.json", file)
    with pytest.raises(ConfigError, match="at least one"):
        trace.merge(tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_forked_child_may_record_for_itself(tmp_path: Path) -> None:
    trace.start()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert not trace.is_recording()
            with trace.record(tmp_path / "child.json"), trace.span("child"):
                pass
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with trace.span("parent"):
        pass
    trace.save(tmp_path / "parent.json")
    trace.stop()
    assert [count(tmp_path / "child.json", name) for name in ("child", "parent")] == [1, 0]
    assert [count(tmp_path / "parent.json", name) for name in ("child", "parent")] == [0, 1]


def test_the_rings_of_a_process_are_not_left_on() -> None:
    assert not _core.trace_is_on()
