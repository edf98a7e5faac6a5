"""The command line: ``spillover`` and ``python -m spillover``."""

from spillover.cli._app import main

__all__ = ["main"]
