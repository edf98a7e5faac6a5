"""When bytes moved, and who waited: recorded, and written for Perfetto and chrome://tracing.

>>> with spillover.trace.record("step.json"):
...     train_step()

Importing this module loads neither torch nor a driver.
"""

from spillover.trace._merge import merge
from spillover.trace._recording import is_recording, record, save, span, start, stop

__all__ = ["is_recording", "merge", "record", "save", "span", "start", "stop"]
