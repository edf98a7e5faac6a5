"""Operators that training meets, for comparing dry runs with runs that compute.

``python -m tests.emulator.dry_operators dry`` (or ``computed``) prints one JSON object: for each
case the types, sizes and strides of its results and gradients, the allocator's peak and its count
of allocations, or the error that it ended with.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

Case = Callable[[], Any]
_MANY = 1 << 17


def make_cases() -> dict[str, Case]:
    """By name; torch is imported once the emulator is on."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    def places(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, device="cuda")

    def spd() -> Tensor:
        factor = new(4, 128, 128)
        return factor @ factor.mT + 128 * torch.eye(128, device="cuda")

    def grad(function: Callable[..., Any], *inputs: Tensor) -> Case:
        """Its results and the gradients of its inputs."""

        def case() -> Any:
            leaves = [value.detach().requires_grad_() for value in inputs]
            found = function(*leaves)
            outputs = [value for value in _tensors(found) if value.requires_grad]
            ones = [torch.ones_like(value) for value in outputs]
            return found, torch.autograd.grad(outputs, leaves, ones, allow_unused=True)

        return case

    def of_module(module: nn.Module, *shape: int) -> Case:
        return grad(module.cuda(), new(*shape))

    def synchronised_batch_norm() -> Any:
        images, ones = new(16, 64, 32, 32), torch.ones(64, device="cuda")
        mean, invstd = torch.batch_norm_stats(images, 1e-5)
        counts = torch.full((1,), 16.0 * 1024, device="cuda")
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            images, mean[None], invstd[None], ones.clone(), ones.clone(), 0.1, 1e-5, counts
        )
        output = torch.batch_norm_elemt(images, ones, ones, mean, invstd, 1e-5)
        sums = torch.batch_norm_backward_reduce(
            output, images, mean, invstd, ones, True, True, True
        )
        last = torch.batch_norm_backward_elemt(
            output, images, mean, invstd, ones, sums[0], sums[1], counts.int()
        )
        return output, sums, last

    scores, labels = new(50, 16, 100), places(99, 16, 20) + 1
    rows = places(100, 3000)
    mask = new(_MANY) > 0
    cases: dict[str, Case] = {}
    for name in ("cholesky", "inv", "slogdet", "eigh", "qr", "svdvals", "pinv", "matrix_exp"):
        cases[f"linalg.{name}"] = grad(getattr(torch.linalg, name), spd())
    cases["linalg.solve"] = grad(torch.linalg.solve, spd(), new(4, 128, 8))
    for name in ("fft", "rfft", "fft2", "hfft"):
        cases[f"fft.{name}"] = grad(getattr(torch.fft, name), new(16, 128, 128))
    cases |= {
        "ctc_loss": grad(
            lambda x: F.ctc_loss(x.log_softmax(-1), labels, [50] * 16, [20] * 16), scores
        ),
        "synchronised batch norm": synchronised_batch_norm,
        "LSTM": of_module(nn.LSTM(128, 256, 2, bidirectional=True), 40, 8, 128),
        "GRU": of_module(nn.GRU(128, 256, 2), 40, 8, 128),
        "GRUCell": of_module(nn.GRUCell(256, 256), 64, 256),
        "grid_sample": grad(
            lambda x, g: F.grid_sample(x, g, align_corners=False),
            new(4, 8, 64, 64),
            new(4, 50, 50, 2),
        ),
        "multinomial": lambda: new(64, 5000).softmax(-1).multinomial(5),
        "searchsorted": lambda: torch.searchsorted(new(64, 5000).sort(-1)[0], new(64, 300)),
        "histc": lambda: new(_MANY).histc(100, -3, 3),
        "cdist": grad(torch.cdist, new(300, 64), new(400, 64)),
        "cdist of p=1": grad(lambda x, y: torch.cdist(x, y, p=1), new(300, 64), new(400, 64)),
        "segment_reduce": grad(
            lambda x: torch.segment_reduce(x, "sum", lengths=torch.full((100,), 30, device="cuda")),
            new(3000, 64),
        ),
        "embedding_bag": grad(
            lambda w: F.embedding_bag(
                places(1000, 20000), w, torch.arange(0, 20000, 10, device="cuda"), mode="mean"
            ),
            new(1000, 64),
        ),
        "embedding": grad(lambda w: F.embedding(places(1000, 20000), w), new(1000, 64)),
        "scatter_reduce": grad(
            lambda x: new(100, 64).scatter_reduce(0, rows[:, None].expand(-1, 64), x, "amax"),
            new(3000, 64),
        ),
        "index_add": grad(lambda x: new(100, 64).index_add(0, rows, x), new(3000, 64)),
        "index_put by a mask": lambda: new(_MANY).index_put_(
            (mask,), torch.zeros((), device="cuda")
        ),
        "masked_scatter": grad(lambda x: x.masked_scatter(mask, new(_MANY)), new(_MANY)),
        "logcumsumexp": grad(lambda x: x.logcumsumexp(-1), new(64, 3000)),
        "cummax": grad(lambda x: x.cummax(-1)[0], new(64, 3000)),
        "topk": grad(lambda x: x.topk(5)[0], new(64, 3000)),
        "median": grad(lambda x: x.median(-1)[0], new(64, 3000)),
        "quantile": grad(lambda x: x.quantile(0.9, -1), new(64, 3000)),
        "repeat_interleave to a size": lambda: places(9, _MANY).repeat_interleave(
            places(1, _MANY) + 1, output_size=_MANY
        ),
        "stft": lambda: torch.stft(
            new(4, 16000), 400, window=torch.hann_window(400, device="cuda"), return_complex=True
        ),
        "multilabel_margin_loss": grad(
            lambda x: F.multilabel_margin_loss(x, places(2, 128, 300)), new(128, 300)
        ),
        "multi_margin_loss": grad(
            lambda x: F.multi_margin_loss(x, places(300, 128)), new(128, 300)
        ),
        "fake quantisation": grad(
            lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), new(_MANY)
        ),
        "fake quantisation of channels": grad(
            lambda x: torch.fake_quantize_per_channel_affine(
                x, new(512).abs(), places(1, 512).int(), 0, -128, 127
            ),
            new(512, 300),
        ),
        "learnt quantisation": grad(
            lambda x, scale, zero: torch._fake_quantize_learnable_per_tensor_affine(
                x, scale, zero, 0, 255, 1.0
            ),
            new(_MANY),
            torch.full((1,), 0.1, device="cuda"),
            torch.zeros(1, device="cuda"),
        ),
        "masked softmax": grad(
            lambda x: torch._masked_softmax(x, mask.view(64, -1), 1), new(64, _MANY // 64)
        ),
        "fractional_max_pool3d": grad(
            lambda x: F.fractional_max_pool3d(x, 2, output_size=8), new(2, 8, 16, 16, 16)
        ),
        "gamma": grad(lambda x: torch._standard_gamma(x.abs() + 1), new(_MANY)),
        "dirichlet": grad(
            lambda x: torch.distributions.Dirichlet(x.abs() + 1, validate_args=False).rsample(),
            new(3000, 64),
        ),
        "unfold and fold": grad(
            lambda x: F.fold(F.unfold(x, 3, padding=1), (32, 32), 3, padding=1),
            new(4, 16, 32, 32),
        ),
        "interpolate": grad(
            lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), new(4, 16, 32, 32)
        ),
        "conv_transpose3d": grad(
            lambda x, w: F.conv_transpose3d(x, w, stride=2),
            new(2, 8, 8, 16, 16),
            new(8, 4, 3, 3, 3),
        ),
        # None of these runs backward: torch's autograd threads let go of Python objects after it
        # has returned, and a process that ends meanwhile aborts.
        "random": lambda: (
            torch._sample_dirichlet(new(3000, 64).abs() + 1),
            torch.poisson(new(_MANY).abs()),
            torch.binomial(torch.full((_MANY,), 10.0, device="cuda"), new(_MANY).sigmoid()),
            torch.randperm(_MANY, device="cuda"),
        ),
        "observer": lambda: torch.aminmax(new(_MANY)),
        "jagged tensors": lambda: F.layer_norm(
            torch.nested.nested_tensor([new(100, 64), new(300, 64)], layout=torch.jagged), (64,)
        ).values(),
    }
    return cases


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if hasattr(value, "untyped_storage") else []


def measure(case: Case) -> dict[str, Any] | str:
    """What a case returns and allocates; an error as its first line."""
    import torch

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        results = [
            [str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
            for tensor in _tensors(case())
        ]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    statistics = torch.cuda.memory_stats()
    return {
        "results": results,
        "peak": statistics["allocated_bytes.all.peak"],
        "allocations": statistics["allocation.all.allocated"] - before,
    }


def main(way: str) -> None:
    """Measure all cases in this process."""
    import spillover.emulator

    spillover.emulator.enable(dry=way == "dry")
    # Cycles that are freed at another moment would be another peak.
    gc.disable()
    cases = make_cases()
    # Its first use imports a part of torch that holds on to tensors for a while.
    measure(cases["jagged tensors"])
    found = {name: measure(case) for name, case in cases.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
