"""Runs operators of other libraries, such as torchvision's, on their CPU kernels.

Such libraries register their operators when ``torch.ops.load_library`` loads them, long after the
emulated device took torch's own.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from spillover._errors import SpilloverError
from spillover._settings import logger


def watch(torch: Any, library: str) -> None:
    """Look after each library that is loaded from now on.

    Parameters
    ----------
    torch
        The module.
    library
        Path of the emulated device's operators.
    """
    # Not CDLL, which lets other threads of Python in.
    adopt = ctypes.PyDLL(library).spillover_emulator_adopt_operator
    adopt.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    names = torch._C._dispatch_get_all_op_names
    load = torch.ops.load_library

    @functools.wraps(load)
    def load_library(path: Any) -> Any:
        before = set(names())
        result = load(path)
        adopted = 0
        for full_name in sorted(set(names()) - before):
            name, _, overload = full_name.partition(".")
            outcome = adopt(name.encode(), overload.encode())
            if outcome < 0:
                raise SpilloverError(f"the emulator could not take over operator {full_name}")
            adopted += outcome
        if adopted:
            logger.info("%d operators of %s run on their CPU kernels", adopted, path)
        return result

    torch.ops.load_library = load_library
