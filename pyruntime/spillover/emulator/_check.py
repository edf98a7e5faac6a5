"""``spillover emulate --check``: says what of the emulated device works on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

from spillover._errors import ConfigError
from spillover._settings import enabled
from spillover.emulator import _command
from spillover.emulator._options import Options

# Runs on the emulated device; prints one JSON line [name, passed, detail] a check.
_PROBE = r"""
import ctypes, json, sys, traceback

def report(name, check):
    try:
        print(json.dumps([name, True, str(check())]), flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps([name, False, reason]), flush=True)

try:
    import torch
except Exception as error:
    print(json.dumps(["torch", False, f"{type(error).__name__}: {error}".splitlines()[0]]))
    sys.exit(0)

def copies():
    host = torch.arange(1 << 16, dtype=torch.float32).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        device = host.to("cuda", non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(device.cpu(), host)
    return "pinned copies on a stream of their own come back intact"

def step():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).cuda()
    optimizer = torch.optim.AdamW(layer.parameters())
    losses = []
    for _ in range(3):
        loss = layer(torch.ones(2, 8, 32, device="cuda")).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
    assert all(loss == loss for loss in losses)
    return "a transformer layer trains"

def capacity():
    free, total = torch.cuda.mem_get_info()
    try:
        torch.empty(total + 1, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return f"{total} bytes; more raises torch.OutOfMemoryError"
    raise AssertionError("an allocation beyond the capacity succeeded")

def checker():
    from spillover.emulator import clear_hazards, hazards
    source = torch.ones(1 << 16, device="cuda")
    stream = torch.cuda.Stream()
    before = len(hazards())
    try:
        with torch.cuda.stream(stream):
            source.add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass
    found = len(hazards()) - before
    clear_hazards()
    assert found, "a forgotten wait was not reported"
    return "a forgotten wait is reported"

report("torch", lambda: f"{torch.__version__} for CUDA {torch.version.cuda}")
report("devices", lambda: f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
ones = lambda: torch.ones(8, 8, device="cuda")
report("operators", lambda: f"the sum of a matrix product is {(ones() @ ones()).sum().item()}")
report("capacity", capacity)
report("copies", copies)
report("training", step)
if sys.argv[1] != "off":
    report("hazards", checker)
"""


def check(options: Options) -> int:
    """Run each check on the emulated device, print a table, and return 0 when all pass."""
    from rich.console import Console
    from rich.table import Table

    if not enabled():
        raise ConfigError("SPILLOVER=0 switches the emulated device off; unset it, or set it to 1")
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, options.hazards],
        env=_command.environment(options),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    table = Table("check", "result", "detail", title="Emulated CUDA device")
    for name, passed, detail in rows:
        table.add_row(name, "[green]works" if passed else "[red]fails", detail)
    if result.returncode != 0:
        table.add_row("process", "[red]fails", f"exit code {result.returncode}; see stderr above")
    Console().print(table)
    return 0 if result.returncode == 0 and rows and all(row[1] for row in rows) else 1
