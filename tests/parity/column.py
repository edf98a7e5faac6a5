"""One column of the parity table: a process whose torch has one allocator and that runs checks.

``python column.py`` takes a check's name a line and answers with its cell a line. The environment
says which column it is (``SPILLOVER_PARITY_COLUMN``) and where the library of the plug-in lies.
``--fraction`` only says whether torch's setting of the memory fraction is a limit.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings

from spillover import emulator

emulator.enable(
    vram="512MiB",
    schedule="late",
    hazards="off",  # A wrong result is what users see; see Note [No checker] in table.py.
    virtual_memory=os.environ.get("SPILLOVER_TEST_VIRTUAL_MEMORY", "1") == "1",
)


def install(column: str) -> None:
    if column == "native":
        return
    if column == "plug-in":
        import torch

        path = os.environ["SPILLOVER_PARITY_PLUG_IN"]
        memory = torch.cuda.memory
        memory.change_current_allocator(
            memory.CUDAPluggableAllocator(path, "test_malloc", "test_free")
        )
        return
    import spillover.allocator

    adapter = {"ours": "full", "fallback": "plain"}[column]
    assert spillover.allocator.install(adapter=adapter, wait_max="0s")


def reason(error: BaseException) -> str:
    """Why a check failed, in one short sentence that is the same in every run."""
    lines = str(error).splitlines() or [type(error).__name__]
    text = re.sub(r"0x[0-9a-f]+", "an address", lines[0])
    text = re.sub(r"\b(?:spillover|CUDA error): ", "", text)
    text = re.sub(r"<\w+\.(\w+): \d+>.*", r"\1", text)
    text = re.split(r"[.;](?: |$)", text)[0].replace("|", "/")
    return text if len(text) <= 90 else text[:87] + "..."


def cell(name: str) -> str:
    from checks import CHECKS, NotApplicableError

    try:
        CHECKS[name]()
    except NotApplicableError:
        return "n/a"
    except Exception as error:
        return f"no: {reason(error)}"
    return "yes"


def main() -> None:
    install(os.environ["SPILLOVER_PARITY_COLUMN"])
    warnings.simplefilter("ignore")
    import torch

    if sys.argv[1:] == ["--fraction"]:
        size = torch.cuda.get_device_properties(0).total_memory // 2
        try:
            torch.zeros(size, dtype=torch.uint8, device="cuda")
            print("not limited")
        except RuntimeError:
            print("limited")
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a check prints must not mix with the replies.
    import memory_checks  # noqa: F401
    import pool_checks  # noqa: F401

    torch.cuda.init()
    for line in sys.stdin:
        print(cell(line.strip()), file=replies, flush=True)
        gc.collect()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
