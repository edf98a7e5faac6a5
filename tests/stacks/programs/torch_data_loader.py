"""A DataLoader with worker processes and pinned memory, and a prefetcher on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator

from _program import main

# isort: split
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler


class Squares(Dataset[dict[str, Tensor]]):
    """Row i holds i and its square."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((256,), float(index)), "y": torch.tensor(index * index)}


def prefetched(loader: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The loader's batches on the device, copied one ahead on another stream."""
    side = torch.cuda.Stream()
    ahead: dict[str, Tensor] | None = None
    for batch in loader:
        with torch.cuda.stream(side):
            arriving = {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream().wait_stream(side)
        for value in arriving.values():
            value.record_stream(torch.cuda.current_stream())
        ahead = arriving
    if ahead is not None:
        yield ahead


def run() -> None:
    """Each row arrives once and intact, with and without the prefetcher."""
    data = Squares()
    loader = DataLoader(
        data,
        batch_size=16,
        sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)),
        num_workers=2,
        pin_memory=True,
        prefetch_factor=2,
        persistent_workers=True,
    )
    for batches in (loader, prefetched(loader)):
        seen: list[int] = []
        total = torch.zeros((), device="cuda")
        for batch in batches:
            x = batch["x"].to("cuda", non_blocking=True)
            y = batch["y"].to("cuda", non_blocking=True)
            total += (x.square().mean(1) - y).abs().sum()
            seen += x[:, 0].int().tolist()
            del batch, x, y
        assert total.item() == 0
        assert sorted(seen) == list(range(len(data)))


if __name__ == "__main__":
    main(run)
