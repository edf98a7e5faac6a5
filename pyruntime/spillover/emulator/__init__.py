"""An emulated CUDA device under the real CUDA build of PyTorch, for machines without a GPU.

``enable()`` before ``import torch`` gives the process emulated devices; ``spillover emulate --
python train.py`` does it for an unmodified script and its child processes. Compute runs on the CPU,
memory limits, streams, events and copies behave as on a GPU, and a happens-before checker reports
accesses that nothing orders. Wall-clock time under the emulator says nothing about a GPU.
"""

from spillover.emulator import _costs as costs
from spillover.emulator._activation import enable, is_enabled, reconfigure
from spillover.emulator._clock import (
    ClockReport,
    MemoryPoint,
    ResourceUse,
    TimeShare,
    advance,
    busy,
    clock_report,
    now_ns,
    write_trace,
)
from spillover.emulator._command import run
from spillover.emulator._control import (
    HostAccess,
    LiveResources,
    acquire,
    clear_hazards,
    hazards,
    host_access,
    leaks,
    live,
    peak_bytes,
    release,
)
from spillover.emulator._dry import BlockGroup, DryReport, Peak, Shortage
from spillover.emulator._dry import report as dry_report
from spillover.emulator._faults import (
    Fault,
    Injection,
    StorageFault,
    call_bytes,
    calls,
    faults,
    slow,
    stuck,
)
from spillover.emulator._options import HazardPolicy, Options, Schedule, UnknownPolicy
from spillover.emulator._profiles import DiskProfile, GpuProfile, HostProfile, Profile
from spillover.emulator._profiles import load as load_profile
from spillover.emulator._profiles import names as profile_names
from spillover.emulator._sweep import SweepFailure, SweepReport, sweep

__all__ = [
    "BlockGroup",
    "ClockReport",
    "DiskProfile",
    "DryReport",
    "Fault",
    "GpuProfile",
    "HazardPolicy",
    "HostAccess",
    "HostProfile",
    "Injection",
    "LiveResources",
    "MemoryPoint",
    "Options",
    "Peak",
    "Profile",
    "ResourceUse",
    "Schedule",
    "Shortage",
    "StorageFault",
    "SweepFailure",
    "SweepReport",
    "TimeShare",
    "UnknownPolicy",
    "acquire",
    "advance",
    "busy",
    "call_bytes",
    "calls",
    "clear_hazards",
    "clock_report",
    "costs",
    "dry_report",
    "enable",
    "faults",
    "hazards",
    "host_access",
    "is_enabled",
    "leaks",
    "live",
    "load_profile",
    "now_ns",
    "peak_bytes",
    "profile_names",
    "reconfigure",
    "release",
    "run",
    "slow",
    "stuck",
    "sweep",
    "write_trace",
]
