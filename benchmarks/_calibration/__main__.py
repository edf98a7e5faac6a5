"""``python -m benchmarks._calibration``: the tables of docs/cost-model.md."""

from __future__ import annotations

import statistics

from benchmarks import _calibration


def main() -> None:
    """Print fitted and held-out cases as two Markdown tables."""
    found = _calibration.outcomes()
    for held_out in (True, False):
        rows = [outcome for outcome in found if outcome.case.held_out == held_out]
        print("Held out" if held_out else "Fit", end=": median error ")
        print(f"{statistics.median(row.error_percent for row in rows):.1f} %\n")
        print("| case | published | simulated | error |\n|---|---|---|---|")
        for row in rows:
            published = f"{row.case.published:,g} {row.case.unit}"
            print(
                f"| {row.case.name} | {published} | {_figure(row)} | {row.signed_percent:+.1f} % |"
            )
        print()
    print("Through the clock\n\n| case | published | clock | error | walk |\n|---|---|---|---|---|")
    walked = {outcome.case.name: outcome for outcome in found}
    for row in _calibration.clocked():
        walk = walked[row.case.name].signed_percent
        print(
            f"| {row.case.name} | {row.case.published:,g} {row.case.unit} | {_figure(row)} "
            f"| {row.signed_percent:+.1f} % | {walk:+.1f} % |"
        )


def _figure(row: _calibration.Outcome) -> str:
    return f"{row.predicted:,.4g}" if row.predicted < 1000 else f"{row.predicted:,.0f}"


if __name__ == "__main__":
    main()
