"""Training programs whose allocations are recorded: dry, so that their peaks may be a card's.

Shapes change from step to step as they do in practice, from a seeded generator. What is drawn is
drawn before the program runs, so the trace is the same on every machine with the same torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._dry import models

_VOCABULARY = 32000


def _language_model(
    width: int, heads: int, layers: int, *, checkpoint: bool = False
) -> models.LanguageModel:
    sizes = width, heads, layers, _VOCABULARY
    return models.make_llama(sizes, torch.bfloat16, checkpoint=checkpoint)


def _train_language(model: nn.Module, shapes: list[tuple[int, int]]) -> None:
    """A step of AdamW for each (batch, length)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for batch, length in shapes:
        tokens = torch.randint(0, _VOCABULARY, (batch, length + 1), device="cuda")
        scores = model(tokens[:, :-1])
        F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def gpt_varying_lengths(generator: random.Random) -> None:
    """A language model of a billion weights on batches padded to their longest text."""
    lengths = [generator.randrange(200, 2000) for _ in range(6)]
    _train_language(_language_model(2048, 16, 14), [(4, length) for length in lengths])


def lora(generator: random.Random) -> None:
    """Low-rank matrices beside a frozen model of four billion weights; lengths vary."""
    model = models.add_low_rank(_language_model(4096, 32, 16)).cuda()
    lengths = [generator.randrange(128, 1500) for _ in range(6)]
    _train_language(model, [(2, length) for length in lengths])


def checkpointing(generator: random.Random) -> None:
    """A language model whose blocks are computed again in the backward pass."""
    model = _language_model(3072, 24, 12, checkpoint=True)
    _train_language(model, [(generator.choice((2, 3, 4)), 2048) for _ in range(4)])


def diffusion_unet(generator: random.Random) -> None:
    """A U-Net trained on buckets of resolutions, with averaged weights and samples in between."""
    model = models.UNet(channels=128).cuda()
    average = models.UNet(channels=128).cuda().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    buckets = ((256, 256), (192, 320), (320, 192), (224, 288), (384, 160))
    for step in range(16):
        height, width = generator.choice(buckets)
        image = torch.randn(14, 3, height, width, device="cuda")
        noise = torch.randn_like(image)
        level = torch.rand(14, 1, 1, 1, device="cuda")
        F.mse_loss(model(image * (1 - level) + noise * level), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, trained in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(trained, 0.001)
            if step % 5 == 4:
                _sample(average, generator.randrange(1, 5))


def _sample(model: nn.Module, count: int) -> None:
    image = torch.randn(count, 3, 384, 384, device="cuda")
    for _ in range(4):
        image = image - 0.1 * model(image)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()

        def layer(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
            convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs))

        self.first, self.second = layer(inputs, width, 1), layer(width, width, 3, stride)
        self.third = layer(width, 4 * width, 1)
        is_same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if is_same else layer(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True)
        return F.relu(self.third(inner) + self.shortcut(x), inplace=True)


class _ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, channels = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                blocks.append(_Bottleneck(channels, width, stride if index == 0 else 1))
                channels = 4 * width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x)), inplace=True), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def resnet_changing_batch(generator: random.Random) -> None:
    """ResNet-50: batches of several sizes, as a search for the largest one tries them."""
    model = _ResNet50().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        batch = generator.randrange(32, 160)
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        labels = torch.randint(0, 1000, (batch,), device="cuda")
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def two_stream_pipeline(generator: random.Random) -> None:
    """Two halves of a model on two streams, micro-batches in turn, inputs on a third stream."""
    with torch.device("cuda"):
        halves = [
            nn.Sequential(*(models.Block(2560, 20) for _ in range(6))).to(torch.bfloat16)
            for _ in range(2)
        ]
    weights = [parameter for half in halves for parameter in half.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    compute, copies = [torch.cuda.Stream() for _ in halves], torch.cuda.Stream()
    for _ in range(4):
        lengths = [generator.randrange(256, 1280) for _ in range(4)]
        for stream in compute:
            stream.wait_stream(torch.cuda.current_stream())
        for length in lengths:
            with torch.cuda.stream(copies):
                x = torch.empty(4, length, 2560, dtype=torch.bfloat16, pin_memory=True).cuda(
                    non_blocking=True
                )
            _pass_on(x, copies, compute[0])
            with torch.cuda.stream(compute[0]):
                between = halves[0](x)
            _pass_on(between, compute[0], compute[1])
            with torch.cuda.stream(compute[1]):
                halves[1](between).float().square().mean().backward()
        for stream in compute:
            torch.cuda.current_stream().wait_stream(stream)
        optimizer.step()
        optimizer.zero_grad()


def _pass_on(tensor: Tensor, source: torch.cuda.Stream, target: torch.cuda.Stream) -> None:
    target.wait_stream(source)
    tensor.record_stream(target)


PROGRAMS: dict[str, Callable[[random.Random], None]] = {
    program.__name__: program
    for program in (
        gpt_varying_lengths,
        lora,
        diffusion_unet,
        resnet_changing_batch,
        two_stream_pipeline,
        checkpointing,
    )
}
