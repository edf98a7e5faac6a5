"""The cost model stays as close to published figures as the documentation says."""

from __future__ import annotations

import functools
import re
import statistics
from pathlib import Path

import pytest
from benchmarks import _calibration

from spillover.emulator._dry_times import CALIBRATION_ERROR_MAX, CALIBRATION_ERROR_MEDIAN

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def outcomes() -> dict[str, _calibration.Outcome]:
    return {outcome.case.name: outcome for outcome in _calibration.outcomes()}


def test_cases_are_split_and_sourced() -> None:
    cases = _calibration.cases()
    assert len({case.name for case in cases}) == len(cases)
    held_out = [case for case in cases if case.held_out]
    assert len(held_out) >= 6
    assert len({case.card for case in held_out}) >= 3
    for case in cases:
        assert len(case.source) > 20, case.name
        assert case.published > 0
    # A case is either one or the other: no shape of one card appears on both sides.
    keys = [(case.card, case.kind, str(sorted(case.model.items()))) for case in cases]
    assert len(set(keys)) == len(keys)


def test_median_error_over_held_out_cases() -> None:
    metrics = _calibration.run(quick=True)["metrics"]
    assert metrics["calibration_error_percent_median"] <= 15
    # A change of the model or of a profile that makes any case much worse is a mistake.
    assert metrics["calibration_error_percent_max"] <= 25
    # What the documentation and the dry runs' reports say holds.
    assert metrics["calibration_error_percent_median"] <= CALIBRATION_ERROR_MEDIAN
    assert metrics["calibration_error_percent_max"] <= CALIBRATION_ERROR_MAX + 0.05
    assert metrics["calibration_clock_cases"] >= 1
    errors = [value for name, value in metrics.items() if name.startswith("calibration_error_p")]
    assert len(errors) == metrics["calibration_cases_held_out"] + 2


@pytest.mark.parametrize("name", [case.name for case in _calibration.cases() if case.held_out])
def test_documentation_states_the_error(name: str) -> None:
    text = (ROOT / "docs" / "cost-model.md").read_text()
    outcome = outcomes()[name]
    match = re.search(
        rf"^\| {re.escape(name)} (?:\|[^|]*){{2}}\| ([+-][0-9.]+) % \|$", text, re.MULTILINE
    )
    assert match is not None, f"docs/cost-model.md does not list {name}"
    stated = float(match.group(1))
    assert stated == pytest.approx(outcome.signed_percent, abs=0.06)


def test_programs_take_under_the_clock_what_the_documentation_says() -> None:
    text = (ROOT / "docs" / "cost-model.md").read_text()
    stated = re.findall(
        r"^\| (\w+) (?:\|[^|]*){2}\| ([+-][0-9.]+) % \| [+-][0-9.]+ % \|$", text, re.MULTILINE
    )
    errors = {name: float(error) for name, error in stated}
    assert len(errors) >= 6
    assert statistics.median(map(abs, errors.values())) <= 15
    for outcome in _calibration.clocked(_calibration.QUICK_PROGRAMS):
        assert errors[outcome.case.name] == pytest.approx(outcome.signed_percent, abs=0.06)
