"""Workspaces of cuBLAS and of kernels, which a GPU's memory statistics contain."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAM = """
import json
import torch

def allocated():
    return torch.cuda.memory_allocated()

a = torch.ones(64, 64, device="cuda")
marks = [allocated()]
a.add_(1)
marks.append(allocated())
for _ in range(3):
    torch.mm(a, a)
    torch.nn.functional.linear(a, a)
marks.append(allocated())
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    torch.bmm(a[None], a[None])
torch.cuda.synchronize()
marks.append(allocated())
torch._C._cuda_clearCublasWorkspaces()
marks.append(allocated())
a @ a
marks.append(allocated())
print(json.dumps([m - marks[0] for m in marks]))
"""

MIB = 1 << 20


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        pytest.param(
            {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"},
            8 * MIB + 128 * 1024,
            marks=pytest.mark.soak,
        ),
        pytest.param({"SPILLOVER_EMULATOR_CUBLAS_WORKSPACE": "0"}, 0, marks=pytest.mark.soak),
    ],
    ids=["default", "configured", "off"],
)
def test_workspace_of_each_stream(
    run_emulated: RunEmulated, environment: dict[str, str], size: int | None
) -> None:
    marks = json.loads(run_emulated(PROGRAM, env=environment).stdout)
    if size is None:
        # Torch's choice for the card that is emulated.
        size = marks[2]
        assert size in (32 * MIB, 8 * MIB + 128 * 1024)
    assert marks == [0, 0, size, 2 * size, 0, size]


KERNELS = """
import json
import torch
import torch.nn.functional as F

HALF = torch.float16

def device(*shape, dtype=HALF):
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)

def extra(function):
    \"""Bytes that were allocated at the peak beside what is alive at the end.\"""
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

aten = torch.ops.aten
images, weight = device(8, 64, 28, 28), device(64, 64, 3, 3)
wide, wide_weight = images.float(), weight.float()
query, keys = device(2, 8, 512, 64), device(2, 2, 512, 64)
many, long_keys = device(16, 8, 512, 64), device(1, 4, 8192, 64)
one = device(1, 4, 1, 64)
flash = aten._scaled_dot_product_flash_attention

def backward(q, k):
    output, lse, cq, ck, mq, mk, seed, offset, _ = flash(q, k, k, 0.0, True)
    return lambda: aten._scaled_dot_product_flash_attention_backward(
        output, q, k, k, output, lse, cq, ck, mq, mk, 0.0, True, seed, offset)

def conv_backward():
    grad = torch.ones_like(images)
    return lambda: aten.convolution_backward(
        grad, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])

def embedding_backward(count, dtype):
    grad = device(count, 32, dtype=dtype)
    rows = torch.randint(0, 1000, (count,), device="cuda")
    return lambda: aten.embedding_dense_backward(grad, rows, 1000, -1, False)

tf32 = extra(lambda: F.conv2d(wide, wide_weight, padding=1))
torch.backends.cudnn.allow_tf32 = False
print(json.dumps({
    "convolution": extra(lambda: F.conv2d(images, weight, padding=1)),
    "in TF32": tf32,
    "in single precision": extra(lambda: F.conv2d(wide, wide_weight, padding=1)),
    "channels last": extra(
        lambda: F.conv2d(images.to(memory_format=torch.channels_last), weight, padding=1)),
    "depthwise": extra(lambda: F.conv2d(images, weight[:, :1], padding=1, groups=64)),
    "its gradients": extra(conv_backward()),
    "attention of many": extra(lambda: flash(many, many, many, 0.0, True)),
    "attention": extra(lambda: flash(query, query, query, 0.0, True)),
    "attention of one query": extra(lambda: flash(one, long_keys, long_keys, 0.0, False)),
    "its dropout": extra(lambda: flash(one, long_keys, long_keys, 0.5, False)),
    "attention's gradients": extra(backward(query, query)),
    "shared keys' gradients": extra(backward(query, keys)),
    "few rows": extra(embedding_backward(3072, HALF)),
    "many rows": extra(embedding_backward(4096, HALF)),
}))
"""


def rounded(*sizes: int) -> int:
    return sum((size + 511) // 512 * 512 for size in sizes)


def test_what_kernels_allocate_for_themselves(run_emulated: RunEmulated) -> None:
    found = json.loads(run_emulated(KERNELS).stdout)
    images, weight = 8 * 64 * 28 * 28, 64 * 64 * 9
    rows = 2 * 8 * 512
    assert found["convolution"] == rounded(2 * (2 * images + weight))
    assert found["in TF32"] == rounded(4 * (2 * images + weight))
    assert found["its gradients"] == rounded(2 * (2 * images + weight))
    for name in (
        "in single precision",
        "depthwise",
        "attention of many",
        "its dropout",
        "few rows",
    ):
        assert found[name] == 0, name
    # The copy of the images in their new format goes on living; nothing else is needed.
    assert found["channels last"] == rounded(2 * images)
    assert found["attention's gradients"] == rounded(4 * rows, 4 * rows * 64)
    expanded = 2 * rows * 64
    assert found["shared keys' gradients"] == rounded(4 * rows, 4 * rows * 64, expanded, expanded)
    # Of fewer blocks than processors the keys are split in two, each with a result of its own.
    assert found["attention"] == rounded(2 * 4 * rows, 2 * 4 * rows * 64)
    splits = found["attention of one query"] / (4 * 4 * (64 + 1))
    assert 2 <= splits <= 32, splits
    parts = 4096 // 10 + 1000
    assert found["many rows"] == rounded(
        *[8 * 4096] * 3, 8 * 1000, 8 * 1000, 8 * parts, 4 * parts * 32
    )


def test_kernel_workspaces_can_be_switched_off(run_emulated: RunEmulated) -> None:
    environment = {"SPILLOVER_EMULATOR_KERNEL_WORKSPACES": "0"}
    found = json.loads(run_emulated(KERNELS, env=environment).stdout)
    assert found.pop("channels last") > 0
    assert not any(found.values())
