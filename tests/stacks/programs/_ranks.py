"""Runs a function in two processes that form a gloo process group on one emulated device each."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spillover import emulator

RANKS = 2


def _rank(rank: int, folder: Path, function: Callable[[int], Any]) -> None:
    torch.manual_seed(0)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    result = function(rank)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps([result, emulator.hazards()]))


def run_ranks(function: Callable[[int], Any], *, timeout_s: float = 200) -> list[Any]:
    """What the function returns on each rank: numbers, lists and dictionaries.

    The children are forked before this process uses CUDA, which saves them the import of torch.
    """
    assert not torch.cuda.is_initialized(), "a process that uses CUDA cannot fork ranks"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(rank, folder, function), daemon=True)
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        assert [process.exitcode for process in processes] == [0] * RANKS
        results = []
        for rank in range(RANKS):
            result, hazards = json.loads((folder / f"{rank}.json").read_text())
            assert not hazards, f"hazards on rank {rank}:\n" + "\n".join(hazards)
            results.append(result)
    return results
