"""Gives a Python process what ``spillover emulate`` or ``spillover run`` put into its environment.

Python imports ``sitecustomize`` at start, before the script. One that this hides runs after it.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_hidden_sitecustomize() -> None:
    """Run the one that Python would have found without ours: a file, a package or bytecode."""
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is None or spec.loader is None:
        return
    ours = sys.modules["sitecustomize"]
    module = importlib.util.module_from_spec(spec)
    # A package finds its own submodules by this name.
    sys.modules["sitecustomize"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules["sitecustomize"] = ours
        raise


def _stop(command: str, reason: object) -> None:
    # An exception here would only print "Failed to import the site module" and a traceback.
    sys.stderr.write(f"spillover {command}: {reason}\n")
    sys.stderr.flush()
    os._exit(2)


class _NoTorchHere:
    """Another interpreter, without spillover: fine for tools, but not for a script with torch."""

    def __init__(self, command: str, reason: ImportError) -> None:
        self._command = command
        self._reason = reason

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            _stop(
                self._command,
                f"{sys.executable} cannot import spillover ({self._reason}); install it into that "
                "environment, or name another python",
            )


def _emulate() -> None:
    from spillover._errors import SpilloverError
    from spillover.emulator._activation import activate, report_at_exit
    from spillover.emulator._options import Options

    try:
        if activate(Options.from_environment()):
            report_at_exit()
    except SpilloverError as error:
        _stop("emulate", error)


def _install_allocator() -> None:
    from spillover._children import RUN_TRACE_VARIABLE
    from spillover._errors import SpilloverError
    from spillover._torch_import import after_torch_import

    # The program's own processes are not recorded: they would write to the same file.
    trace = os.environ.pop(RUN_TRACE_VARIABLE, None)

    def install() -> None:
        from spillover.allocator import install, record_trace

        try:
            install()
            if trace is not None:
                record_trace(trace)
        except SpilloverError as error:
            _stop("run", error)

    after_torch_import(install)


for variable, command, action in (
    ("SPILLOVER_EMULATOR", "emulate", _emulate),
    ("SPILLOVER_RUN", "run", _install_allocator),
):
    if os.environ.get(variable) == "1":
        try:
            action()
        except ImportError as error:
            sys.meta_path.insert(0, _NoTorchHere(command, error))
_run_hidden_sitecustomize()
