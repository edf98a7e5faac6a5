"""Every kind of bug is reported by its name; the programs without it, and others, are not."""

from __future__ import annotations

import functools
import re

import pytest
from benchmarks._hazards import clean, kinds

PROGRAMS = [kind.program.__name__ for kind in kinds.KINDS]
SCHEDULES = [
    "late",
    *(pytest.param(name, marks=pytest.mark.soak) for name in ("eager", "threaded", "random")),
]


@functools.lru_cache(maxsize=8)
def reports_of(schedule: str) -> dict[str, list[str]]:
    return kinds.measure(schedule)


@functools.lru_cache(maxsize=32)
def clean_reports(group: str, schedule: str) -> dict[str, list[str]]:
    return clean.measure(group, schedule, uninitialized=group == "native")


def test_there_are_enough_kinds() -> None:
    assert len({kind.name for kind in kinds.KINDS}) >= 16
    assert len({program.__name__ for group in clean.GROUPS.values() for program in group}) >= 12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", kinds.KINDS, ids=PROGRAMS)
def test_kind_is_reported(kind: kinds.Kind, schedule: str) -> None:
    found = reports_of(schedule)[f"{kind.program.__name__}/broken"]
    assert kinds.caught(kind, found), found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", kinds.KINDS, ids=PROGRAMS)
def test_corrected_program_is_silent(kind: kinds.Kind, schedule: str) -> None:
    assert reports_of(schedule)[f"{kind.program.__name__}/corrected"] == []


def test_report_says_what_where_and_what_to_add() -> None:
    (text,) = reports_of("late")["no_wait_before_use/broken"]
    lines = text.splitlines()
    assert re.match(r"hazard: read of 262144 bytes at 0x\w+ by aten::mul", lines[0])
    assert "  kind: no wait before use" in lines
    assert "memory: bytes 0 to 262144 of a block of 262144 bytes of a caching allocator" in text
    assert "operand: argument self: Float [65536], bytes 0 to 262144 of 262144" in text
    for title in ("handed out at:", "the read was launched at:", "the earlier write was launched"):
        place = next(i for i, line in enumerate(lines) if title in line)
        stack = []
        for line in lines[place + 1 :]:
            if not line.startswith("    File "):
                break
            stack.append(line)
        assert "kinds.py" in stack[-1], title
        assert stack[-1].endswith("in no_wait_before_use"), title
    assert re.search(
        r"missing edge: stream (\d+) \(operation \d+\) -> stream 0; add before the read: "
        r"stream_0.wait_event\(event recorded on stream \1 after the write\)",
        lines[-1],
    )


#: Parts of reports that say what to do, beside the missing edge of the others.
ADVICE = {
    "block_reused_under_another_stream": (
        "its earlier owner gave it back at:",
        "tensor.record_stream(stream_",
    ),
    "use_after_free": ("free it after its last use",),
    "double_free": ("free it once",),
    "access_while_unmapped": ("map it first",),
    "cross_device_without_peer_access": ("cuCtxEnablePeerAccess",),
    "stream_used_after_destruction": ("keep the stream until its last use",),
    "uninitialised_read": ("memory: bytes 0 to 65536 of 65536 bytes", "write the memory first"),
    "uninitialised_read_of_a_block": ("of a caching allocator, handed out at:",),
    "host_thread_did_not_wait": ("another host thread has waited for the write", "release"),
    "host_write_during_copy": ("from cuMemHostAlloc, first made at:",),
    "dependent_copies": ("by copy 1", "by copy 0", "a batch of its own"),
}


@pytest.mark.parametrize("program", ADVICE)
def test_report_says_what_to_do(program: str) -> None:
    text = "\n".join(reports_of("late")[f"{program}/broken"])
    for part in ADVICE[program]:
        assert part in text, text


def test_reports_use_the_names_that_cuda_documents() -> None:
    texts = [text for found in reports_of("late").values() for text in found]
    assert not [text for text in texts if re.search(r"\bcu\w+_v\d\b", text)]


def test_only_who_was_not_told_hears_of_other_threads() -> None:
    for program, texts in reports_of("late").items():
        told = any("another host thread" in text for text in texts)
        assert told == (program == "host_thread_did_not_wait/broken"), program


@pytest.mark.parametrize("program", clean.GROUPS["native"], ids=lambda program: program.__name__)
def test_no_false_alarm(program: object) -> None:
    reports = clean_reports("native", "random")
    assert reports[program.__name__] == []  # type: ignore[attr-defined]


@pytest.mark.soak
@pytest.mark.parametrize("schedule", ["late", "eager", "threaded", "random"])
@pytest.mark.parametrize("group", clean.GROUPS)
def test_no_false_alarm_anywhere(group: str, schedule: str) -> None:
    assert {name: found for name, found in clean_reports(group, schedule).items() if found} == {}
