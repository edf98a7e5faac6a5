"""A torchvision ResNet: forward, backward and steps, in both memory formats, and in bfloat16."""

from __future__ import annotations

from _program import assert_close, assert_equal_tensors, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from torch import nn

NEEDS = ("torchvision",)


def train(
    device: str, memory_format: torch.memory_format, *, amp: bool = False
) -> tuple[list[float], nn.Module]:
    """Losses of three steps, and the model."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images = torch.randn(4, 3, 32, 32).to(device, memory_format=memory_format)
    labels = torch.arange(4).to(device)
    losses = []
    for _ in range(3):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.conv1.weight.is_contiguous(memory_format=memory_format)
    return losses, model.eval()


def run() -> None:
    """Float32 equals the CPU to the last bit; bfloat16 learns."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        losses, model = train("cuda", memory_format)
        expected, host = train("cpu", memory_format)
        assert_learns(losses)
        assert_close(losses, expected, tolerance=0.0)
        assert_equal_tensors(list(model.state_dict().values()), list(host.state_dict().values()))
    losses, _ = train("cuda", torch.channels_last, amp=True)
    assert_learns(losses)


if __name__ == "__main__":
    main(run, needs=NEEDS)
