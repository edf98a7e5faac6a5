"""``python -m benchmarks._calibration``: the table of docs/cost-model.md."""

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
            predicted = f"{row.predicted:,.4g}" if row.predicted < 1000 else f"{row.predicted:,.0f}"
            print(f"| {row.case.name} | {published} | {predicted} | {row.signed_percent:+.1f} % |")
        print()


if __name__ == "__main__":
    main()
