"""Cost of the emulated device: what it adds to an operator over the CPU kernel that it runs.

The physical limit is the CPU operator itself, timed in turn with the emulated one on tensors of the
same shape, so each figure is what emulation adds. Results are compared bit for bit. No peer
emulates a CUDA device under PyTorch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks import _harness, _opdb
from benchmarks._hazards import clean, kinds

# Runs in a process of its own for each policy of the checker; prints one JSON object.
_PROGRAM = r"""
import json, statistics, sys, time
import spillover.emulator
policy, repeats, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spillover.emulator.enable(vram="1GiB", hazards=policy)
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
SIZE = 1024

def operands(device):
    generator = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.rand(*shape, generator=generator).to(device)
    return {"a": new(SIZE), "b": new(SIZE), "m": new(32, 32), "n": new(32, 32),
            "w": new(32), "i": torch.arange(32, device=device)}

OPERATORS = {
    "add": lambda t: t["a"] + t["b"],
    "mul_scalar": lambda t: t["a"] * 2.0,
    "add_": lambda t: t["a"].add_(t["b"], alpha=0.0),
    "exp": lambda t: t["a"].exp(),
    "sum": lambda t: t["a"].sum(),
    "mm": lambda t: t["m"] @ t["n"],
    "linear": lambda t: F.linear(t["m"], t["n"], t["w"]),
    "gelu": lambda t: F.gelu(t["a"]),
    "layer_norm": lambda t: F.layer_norm(t["m"], (32,), t["w"], t["w"]),
    "softmax": lambda t: t["m"].softmax(-1),
    "index_select": lambda t: t["m"].index_select(0, t["i"]),
    "cat": lambda t: torch.cat([t["a"], t["b"]]),
    "where": lambda t: torch.where(t["a"] > 0.5, t["a"], t["b"]),
    "clone": lambda t: t["a"].clone(),
}

def time_calls(function, tensors):
    start = time.perf_counter_ns()
    for _ in range(calls):
        function(tensors)
    return (time.perf_counter_ns() - start) / calls / 1e3

cpu, cuda = operands("cpu"), operands("cuda")
result = {"operators": {}, "equal": True}
with torch.no_grad():
    for name, function in OPERATORS.items():
        result["equal"] &= torch.equal(function(cpu), function(cuda).cpu())
        pairs = []
        for _ in range(repeats):
            pairs.append((time_calls(function, cpu), time_calls(function, cuda)))
        result["operators"][name] = {
            "cpu_us": statistics.median(p[0] for p in pairs),
            "cuda_us": statistics.median(p[1] for p in pairs),
            "added_us": statistics.median(p[1] - p[0] for p in pairs),
        }

host, device = torch.ones(SIZE).pin_memory(), torch.empty(SIZE, device="cuda")
def copy(_):
    device.copy_(host, non_blocking=True)
samples = []
for _ in range(repeats):
    samples.append(time_calls(copy, None))
    torch.cuda.synchronize()
result["copy_us"] = statistics.median(samples)
event = torch.cuda.Event()
samples = []
for _ in range(repeats):
    samples.append(time_calls(lambda _: event.record(), None))
    torch.cuda.synchronize()
result["event_record_us"] = statistics.median(samples)
result["hazards"] = len(spillover.emulator.hazards()) if policy != "off" else 0
print(json.dumps(result))
"""


# The ordinary training step of a small GPT, checker on or off; prints the fastest step in seconds.
_STEP_PROGRAM = r"""
import sys, time
import spillover.emulator
spillover.emulator.enable(vram="1GiB", hazards=sys.argv[1])
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
nn = torch.nn
layers = [nn.TransformerEncoderLayer(192, 6, 768, dropout=0.0, batch_first=True) for _ in range(4)]
model = nn.Sequential(nn.Embedding(256, 192), *layers, nn.Linear(192, 256)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(256, (4, 64), device="cuda")
seconds = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    seconds.append(time.perf_counter() - start)
print(min(seconds))
"""


def _step_seconds(policy: str, *, quick: bool) -> float:
    output = subprocess.run(
        [sys.executable, "-c", _STEP_PROGRAM, policy, "5" if quick else "30"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return float(output.splitlines()[-1])


def _judge(*, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the checker as a judge, and what it reported where it should not have."""
    schedules = ("late",) if quick else ("late", "eager", "threaded", "random")
    groups = clean.QUICK_GROUPS if quick else tuple(clean.GROUPS)
    missed, alarms, programs = [], {}, 0
    for schedule in schedules:
        reports = kinds.measure(schedule)
        for kind in kinds.KINDS:
            name = kind.program.__name__
            if not kinds.caught(kind, reports[f"{name}/broken"]):
                missed.append(f"{name} ({schedule})")
            if reports[f"{name}/corrected"]:
                alarms[f"{name} ({schedule})"] = reports[f"{name}/corrected"]
    for group in groups:
        for schedule in schedules:
            found = clean.measure(group, schedule)
            programs += len(found) if schedule == schedules[0] else 0
            alarms.update({f"{k} ({group}, {schedule})": v for k, v in found.items() if v})
    missed_programs = {name.split(" ")[0] for name in missed}
    checked, unchecked = (_step_seconds(policy, quick=quick) for policy in ("raise", "off"))
    metrics = {
        "hazard_kinds_planted": len(kinds.KINDS),
        "hazard_kinds_caught": len(kinds.KINDS) - len(missed_programs),
        "hazard_programs": programs,
        "hazard_false_alarms": sum(len(texts) for texts in alarms.values()),
        "hazard_overhead": checked / unchecked,
    }
    return metrics, {"missed": missed, "false_alarms": alarms}


def _measure(policy: str, *, quick: bool) -> dict[str, Any]:
    # Few calls a repeat, so that most pairs end well within a time slice: in a pair of 1,000 calls
    # (5 ms) a busy machine interrupts one side or both, and their difference is other processes'
    # time, three to four times that of the operator.
    repeats, calls = (20 if quick else 420), 50
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM, policy, str(repeats), str(calls)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    if not result["equal"] or result["hazards"]:
        raise AssertionError(f"the emulated operators are wrong with hazards={policy}: {result}")
    return result


#: The quick form compares these few; figures come from the full form.
_QUICK_OPERATORS = ("add", "nn_functional_linear", "nn_functional_dropout", "to_sparse", "svd")


def _compare_operators(*, quick: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """Counts of torch's own operator samples that agree with the CPU, and the others by name."""
    metrics: dict[str, int] = {}
    details: dict[str, Any] = {}
    modes = {
        "opdb": "float32",
        "opdb_bf16": "bfloat16",
        "opdb_sparse": "sparse",
        "opdb_accesses": "accesses",
    }
    for prefix, mode in modes.items():
        if quick and mode in ("sparse", "accesses"):
            continue  # Each mode costs its processes' start.
        report = _opdb.run(mode, names=_QUICK_OPERATORS if quick else None)
        for status in ("pass", "fail", "skip"):
            metrics[f"{prefix}_{status}"] = report.count(status)
            if status != "pass":
                details[f"{prefix}_{status}"] = report.named(status)
        details[f"{prefix}_absent"] = report.count("absent")
    return metrics, details


def run(*, quick: bool) -> dict[str, Any]:
    """Measure with the happens-before checker on (as tests and users run it) and off."""
    checked, unchecked = _measure("raise", quick=quick), _measure("off", quick=quick)

    def added(result: dict[str, Any]) -> dict[str, float]:
        return _harness.spread([row["added_us"] for row in result["operators"].values()])

    judged, judged_details = _judge(quick=quick)
    agreement, disagreement = _compare_operators(quick=quick)
    return {
        "metrics": {
            **judged,
            "op_overhead_us_median": added(checked)["median"],
            "op_overhead_us_max": added(checked)["max"],
            "op_overhead_unchecked_us_median": added(unchecked)["median"],
            "copy_launch_us_median": checked["copy_us"],
            "event_record_us_median": checked["event_record_us"],
            **agreement,
        },
        "details": {
            "checked": checked,
            "unchecked": unchecked,
            "hazards": judged_details,
            "opdb": disagreement,
        },
        "notes": [
            "added by emulation to the same operator on the CPU, 1,024 elements, one thread, "
            "checker on; median over operators of medians over paired repeats of 50 calls",
            "hazard_overhead: fastest training step of a small GPT with the checker, over without",
            "emulated times say nothing about a GPU",
            "opdb: operators of torch's op_db whose first 4 samples agree with the CPU, forward "
            "and backward (bf16: forward); skipped and differing ones are named in the details",
        ],
    }
