"""Operators that torchvision adds to torch: boxes, regions, deformed convolutions."""

from __future__ import annotations

from _program import assert_equal_tensors, main

# isort: split
import torch
from torch import Tensor

NEEDS = ("torchvision",)


def results(device: str) -> list[Tensor]:
    """What each operator returns, and gradients."""
    from torchvision.ops import deform_conv2d, nms, ps_roi_align, roi_align, roi_pool

    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    corners = new(32, 2) * 20
    boxes = torch.cat([corners, corners + 1 + new(32, 2) * 10], 1)
    kept = nms(boxes, new(32), 0.3)
    features = new(1, 8, 32, 32).requires_grad_()
    pooled = [
        roi_align(features, [boxes[kept]], 4),
        roi_pool(features, [boxes[kept]], 4),
        ps_roi_align(features, [boxes[kept]], 2),
        deform_conv2d(features, new(1, 18, 32, 32), new(4, 8, 3, 3), padding=1),
    ]
    torch.stack([p.square().mean() for p in pooled]).sum().backward()
    return [kept, *pooled, features.grad]


def run() -> None:
    """Each equals the CPU to the last bit."""
    device = results("cuda")
    assert all(tensor.is_cuda for tensor in device)
    assert_equal_tensors(device, results("cpu"))


if __name__ == "__main__":
    main(run, needs=NEEDS)
