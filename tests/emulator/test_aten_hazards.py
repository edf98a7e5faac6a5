"""Ordering bugs at torch level are reported, and their corrected versions are not.

Each program runs with its bug and without it, in one process under the policy "count"; the reports
that it caused come back as text.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

RunEmulated = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAMS = '''
import json
import torch
from torch.cuda import Stream, current_stream, stream
from spillover import emulator

SIZE = 1 << 16


def pinned(value):
    return torch.full((SIZE,), value).pin_memory()


def on_device(value):
    return torch.full((SIZE,), value, device="cuda")


def use_before_arrival(correct):
    """A copy to the device is used on another stream without waiting for it."""
    side, host, buffer = Stream(), pinned(3.0), on_device(0.0)
    torch.cuda.synchronize()
    with stream(side):
        buffer.copy_(host, non_blocking=True)
    if correct:
        current_stream().wait_stream(side)
    (buffer * 2).sum()


def leave_before_produced(correct):
    """A copy to the host does not wait for the operator that makes the data."""
    side, host, a = Stream(), pinned(0.0), on_device(0.0)
    torch.cuda.synchronize()
    b = a + 3
    if correct:
        side.wait_stream(current_stream())
    with stream(side):
        host.copy_(b, non_blocking=True)
    side.synchronize()


def staging_buffer_reused(correct):
    """A CPU operator overwrites a pinned buffer that a copy still reads."""
    side, host, buffer = Stream(), pinned(3.0), on_device(0.0)
    torch.cuda.synchronize()
    with stream(side):
        buffer.copy_(host, non_blocking=True)
    if correct:
        side.synchronize()
    host.fill_(-1)
    side.synchronize()


def staging_buffer_refilled(correct):
    """The same, with copy_ from another CPU tensor."""
    side, host, buffer = Stream(), pinned(3.0), on_device(0.0)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    with stream(side):
        buffer.copy_(host, non_blocking=True)
        done.record()
    if correct:
        done.synchronize()
    host.copy_(torch.ones(SIZE))
    side.synchronize()


def staging_list_reused(correct):
    """The same, with lists of tensors."""
    side, host, buffer = Stream(), pinned(3.0), on_device(0.0)
    torch.cuda.synchronize()
    with stream(side):
        torch._foreach_copy_([buffer], [host], non_blocking=True)
    if correct:
        side.synchronize()
    torch._foreach_mul_([host], 2.0)
    side.synchronize()


def early_free(correct):
    """A tensor in use by another stream is freed, and its memory given to a new one."""
    side, host, buffer = Stream(), pinned(0.0), on_device(3.0)
    side.wait_stream(current_stream())
    with stream(side):
        host.copy_(buffer, non_blocking=True)
    if correct:
        buffer.record_stream(side)
    pointer = buffer.data_ptr()
    del buffer
    other = on_device(9.0)
    assert correct or other.data_ptr() == pointer, "the test needs the block to be reused"
    side.synchronize()


def host_read_before_sync(correct):
    """A CPU operator reads a pinned buffer before the copy into it is done."""
    side, host, buffer = Stream(), pinned(0.0), on_device(3.0)
    side.wait_stream(current_stream())
    with stream(side):
        host.copy_(buffer, non_blocking=True)
    if correct:
        side.synchronize()
    host.sum().item()
    side.synchronize()


def host_optimizer_before_sync(correct):
    """A fused CPU optimizer reads a gradient that is still arriving."""
    side, grad = Stream(), pinned(0.0)
    weight, moments = torch.ones(SIZE), [torch.zeros(SIZE), torch.zeros(SIZE)]
    source = on_device(1.0)
    side.wait_stream(current_stream())
    with stream(side):
        grad.copy_(source, non_blocking=True)
    if correct:
        side.synchronize()
    torch._fused_adamw_(
        [weight], [grad], [moments[0]], [moments[1]], [], [torch.ones(())], lr=0.1, beta1=0.9,
        beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )
    side.synchronize()


def same_columns(correct):
    """Two streams write to column slices of one tensor: to the same ones, or to disjoint ones."""
    side, whole = Stream(), torch.zeros(64, 64, device="cuda")
    torch.cuda.synchronize()
    whole[:, :32].add_(1)
    with stream(side):
        (whole[:, 32:] if correct else whole[:, 16:48]).add_(1)
    torch.cuda.synchronize()
    assert not correct or whole.sum().item() == 64 * 64


def operators_on_two_streams(correct):
    """An operator reads on one stream what another writes in place."""
    side, a = Stream(), on_device(1.0)
    torch.cuda.synchronize()
    a.mul_(2)
    if correct:
        side.wait_stream(current_stream())
    with stream(side):
        a.sum()
    torch.cuda.synchronize()


def batch_norm_statistics(correct):
    """Running statistics are written, although the operator's schema does not say so."""
    side, x = Stream(), torch.randn(4, 3, 5, device="cuda")
    layer = torch.nn.BatchNorm1d(3).cuda()
    torch.cuda.synchronize()
    layer(x)
    if correct:
        side.wait_stream(current_stream())
    with stream(side):
        layer.running_mean.add_(0)
    torch.cuda.synchronize()


def nothing_wrong(correct):
    """Reads of one tensor on several streams, and CPU work on ordinary memory, are no hazards."""
    side, a, host = Stream(), on_device(1.0), torch.ones(SIZE)
    side.wait_stream(current_stream())
    b = a + 1
    with stream(side):
        c = a * 2
    host.add_(1)
    torch.cuda.synchronize()
    (b + c).sum().item()


results = {}
for program in [
    use_before_arrival, leave_before_produced, staging_buffer_reused, staging_buffer_refilled,
    staging_list_reused, early_free, host_read_before_sync, host_optimizer_before_sync,
    same_columns, operators_on_two_streams, batch_norm_statistics, nothing_wrong,
]:
    for correct in (True, False):
        emulator.clear_hazards()
        program(correct)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        results[f"{program.__name__}/{correct}"] = emulator.hazards()
print(json.dumps(results))
'''

# The operators or copies that a report of the bug must name.
BUGS = {
    "use_before_arrival": ["aten::mul"],
    "leave_before_produced": ["aten::add"],
    "staging_buffer_reused": ["aten::fill_"],
    "staging_buffer_refilled": ["aten::copy_"],
    "staging_list_reused": ["aten::"],
    "early_free": ["aten::fill_"],
    "host_read_before_sync": ["aten::sum"],
    "host_optimizer_before_sync": ["aten::_fused_adamw_"],
    "same_columns": ["aten::add"],
    "operators_on_two_streams": ["aten::mul", "aten::sum"],
    "batch_norm_statistics": ["aten::add"],
}


# One run a schedule, shared by the tests of this file.
_reports: dict[str, dict[str, list[str]]] = {}


@pytest.fixture(
    params=[
        "late",
        pytest.param("eager", marks=pytest.mark.soak),
        pytest.param("threaded", marks=pytest.mark.soak),
    ]
)
def reports(request: pytest.FixtureRequest, run_emulated: RunEmulated) -> dict[str, list[str]]:
    schedule = request.param
    if schedule not in _reports:
        result = run_emulated(PROGRAMS, schedule=schedule, hazards="count")
        _reports[schedule] = json.loads(result.stdout.splitlines()[-1])
    return _reports[schedule]


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_reported(reports: dict[str, list[str]], bug: str) -> None:
    text = "\n".join(reports[f"{bug}/False"])
    assert text, f"{bug} was not reported"
    for name in BUGS[bug]:
        assert name in text


@pytest.mark.parametrize("bug", [*BUGS, "nothing_wrong"])
def test_corrected_program_is_silent(reports: dict[str, list[str]], bug: str) -> None:
    assert reports[f"{bug}/True"] == []
    if bug == "nothing_wrong":
        assert reports[f"{bug}/False"] == []


def test_policy_raise_stops_at_the_faulty_line(run_emulated: RunEmulated) -> None:
    result = run_emulated(
        """
        import torch

        side = torch.cuda.Stream()
        hosts = [torch.full((1 << 16,), 3.0).pin_memory() for _ in range(3)]
        buffers = [torch.zeros(1 << 16, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for host, buffer in zip(hosts, buffers):
                buffer.copy_(host, non_blocking=True)
        attempts = [
            lambda: hosts[0].fill_(-1),
            lambda: hosts[1][::2].mul_(2),
            lambda: buffers[2].add_(1),
        ]
        for attempt in attempts:
            try:
                attempt()
            except RuntimeError as error:
                print("raised", str(error).splitlines()[0])
        side.synchronize()
        print("kept", [t.sum().item() == 3 * (1 << 16) for t in hosts + buffers])
        """,
        hazards="raise",
    )
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["raised spillover emulator"] * 3
    assert "aten::fill_" in lines[0]
    assert "aten::mul_" in lines[1]
    assert "aten::add_" in lines[2]
    # The refused operators did not run.
    assert lines[3] == "kept " + str([True] * 6)
