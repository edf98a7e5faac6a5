"""What ``optimizer.state[parameter]`` is for an optimizer on the host.

Tools move the state of optimizers to where the weights are (Lightning does when training begins and
when it resumes), which would fill the device with what is off it on purpose. A tensor of a device
that is put into such a dictionary is therefore copied to the host, in the place of what was there.
"""

from __future__ import annotations

from typing import Any

import torch


class HostEntry(dict[str, Any]):
    """The state of one parameter by name; tensors that come from a device go to the host.

    Assigning one blocks the host until the copy is over, on the current stream.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            value = on_host(self.get(name), value)
        super().__setitem__(name, value)


def on_host(old: Any, value: torch.Tensor) -> torch.Tensor:
    """``value`` in host memory: that of ``old``, where this is a host tensor like it."""
    is_like = (
        isinstance(old, torch.Tensor)
        and old.device.type == "cpu"
        and (old.shape, old.dtype) == (value.shape, value.dtype)
    )
    with torch.no_grad():
        return old.copy_(value) if is_like else value.detach().cpu()
