"""What child processes inherit: a folder on their path whose ``sitecustomize`` asks the environment
what of Spillover a Python process is to have from its start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

#: "1" has a Python process install the allocator once it imports torch.
RUN_VARIABLE = "SPILLOVER_RUN"
#: The file of what the first of them allocates on device 0; it takes the variable away.
RUN_TRACE_VARIABLE = "SPILLOVER_RUN_TRACE"
#: The file of a trace of the whole run, and the number of the process that writes it.
TRACE_VARIABLE = "SPILLOVER_TRACE"
TRACE_OWNER_VARIABLE = "SPILLOVER_TRACE_OWNER"


def with_site(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with that folder first on the path of Python processes."""
    site = str(Path(__file__).with_name("_site"))
    rest = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry != site]
    return {**environment, "PYTHONPATH": os.pathsep.join([site, *filter(None, rest)])}
