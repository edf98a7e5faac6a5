"""docs/parity.md says what the checks of tests/parity say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import table

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(table.TORCH + "."),
    reason=f"docs/parity.md is of torch {table.TORCH}",
)


def test_every_public_function_of_torch_cuda_memory_has_a_row() -> None:
    rows = table.committed()["ours"]
    missing = [
        name
        for name in torch.cuda.memory.__all__
        if f"torch.cuda.{name}" not in rows and f"torch.cuda.memory.{name}" not in rows
    ]
    assert not missing


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("column", table.COLUMNS)
def test_the_document_says_what_the_checks_say(column: str) -> None:
    assert table.run((column,))[column] == table.committed()[column]
