"""Hooks that move a model's tensors off the device and back in time."""

from spillover.hooks._activations import (
    ActivationStats,
    OffloadedActivations,
    offload_activations,
)
from spillover.hooks._parameters import StreamedParameters, StreamStats, stream_parameters

__all__ = [
    "ActivationStats",
    "OffloadedActivations",
    "StreamStats",
    "StreamedParameters",
    "offload_activations",
    "stream_parameters",
]
