"""What driver calls would cost on a card, so that counts of unlike calls can be compared.

Times of the emulated driver say nothing about a GPU. These are times of an A100 for one 2 MiB page,
and both readings of them are given: each price once for every page that a call is about (right for
allocators that work page by page, too high for large handles), and once for every call (too low for
large ones). The truth for a call about many pages lies in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Price:
    """Microseconds that a driver call takes, and where the number comes from.

    ``unit`` is what is charged for where pages are counted: every page, or every call.
    """

    microseconds: float
    unit: Literal["page", "call"]
    source: str


_KVCACHED = "ovg-project/kvcached (commit 32b7578), benchmarks/bench_vmm/README.md: A100, mean"

PRICES: Mapping[str, Price] = {
    "cuMemCreate": Price(193, "page", _KVCACHED),
    "cuMemMap": Price(1.45, "page", _KVCACHED),
    "cuMemSetAccess": Price(36, "page", _KVCACHED),
    "cuMemUnmap": Price(25.6, "page", _KVCACHED),
    "cuMemRelease": Price(25.6, "page", "assumed: as cuMemUnmap, the other half of giving back"),
    "cuMemAddressReserve": Price(19, "call", _KVCACHED + ", 8 GB in one call"),
    "cuMemAlloc": Price(230.45, "page", "assumed: cuMemCreate + cuMemMap + cuMemSetAccess"),
    "cuMemFree": Price(51.2, "page", "assumed: cuMemUnmap + cuMemRelease, without its waiting"),
    "cuEventRecord": Price(1.0, "call", "assumed: a call that only queues work"),
    "cuEventQuery": Price(1.0, "call", "assumed: as cuEventRecord"),
    "cuStreamQuery": Price(1.0, "call", "assumed: as cuEventRecord"),
    "cuStreamWaitEvent": Price(1.0, "call", "assumed: as cuEventRecord"),
    "cuEventSynchronize": Price(1.0, "call", "assumed: the call alone, without its waiting"),
    "cuStreamSynchronize": Price(1.0, "call", "assumed: the call alone, without its waiting"),
    "cuCtxSynchronize": Price(1.0, "call", "assumed: the call alone, without its waiting"),
}


def priced_ms(
    calls: Mapping[str, int], size_bytes: Mapping[str, int], *, per: Literal["page", "call"]
) -> float:
    """Milliseconds that the calls would take on the priced card.

    Parameters
    ----------
    calls, size_bytes
        Number of calls and the bytes that they were about, by function. Functions without a price
        cost nothing.
    per
        ``"page"``: prices of a page are charged for each 2 MiB. ``"call"``: for each call.
    """
    total_us = 0.0
    for name, price in PRICES.items():
        count = float(calls.get(name, 0))
        if per == "page" and price.unit == "page":
            # A call about less than a page costs a whole one.
            count = max(count, size_bytes.get(name, 0) / _PAGE_BYTES)
        total_us += count * price.microseconds
    return total_us / 1e3
