"""Hooks that move a model's tensors off the device and back in time."""

from spillover.hooks._activation_modules import OffloadedModules, offload_activations_of
from spillover.hooks._activations import (
    ActivationStats,
    OffloadedActivations,
    offload_activations,
)
from spillover.hooks._parameters import StreamedParameters, StreamStats, stream_parameters

__all__ = [
    "ActivationStats",
    "OffloadedActivations",
    "OffloadedModules",
    "StreamStats",
    "StreamedParameters",
    "offload_activations",
    "offload_activations_of",
    "stream_parameters",
]
