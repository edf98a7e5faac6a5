"""Adds up what a program's operators take on a card, one after another on one stream."""

from __future__ import annotations

from spillover.emulator import _costs
from spillover.emulator._profiles import Profile


class Walk:
    """The kernels of a program so far, as they run on one card.

    Communication between cards is not in it, and neither are copies: the published figures that it
    is compared with keep everything on the device and hide their communication as far as they can.
    """

    def __init__(self, profile: Profile, dtype: _costs.DType) -> None:
        self.gpu = profile.gpu
        self.dtype: _costs.DType = dtype
        self.device_ns = 0
        self.kernels = 0
        self._operator_ns = profile.host.operator_us * 1000

    def total_ns(self) -> int:
        """Time of the program: the device's, or the host's where it cannot launch fast enough."""
        device_ns = self.device_ns + self.kernels * self.gpu.kernel_gap_us * 1000
        return round(max(device_ns, self.kernels * self._operator_ns))

    def moves(self, size_bytes: float, *, times: int = 1) -> None:
        """``times`` kernels that each only move ``size_bytes``."""
        self._add(_costs.bytes_bound_ns(self.gpu, round(size_bytes)), times)

    def matmul(self, m: int, n: int, k: int, *, batch: int = 1, times: int = 1) -> None:
        """``times`` matrix products."""
        shape = _costs.MatmulShape(m=m, n=n, k=k, batch=batch)
        self._add(_costs.matmul_ns(self.gpu, shape, self.dtype), times)

    def linear(self, tokens: int, features_in: int, features_out: int) -> None:
        """Forward of a linear layer."""
        self.matmul(tokens, features_out, features_in)

    def linear_backward(self, tokens: int, features_in: int, features_out: int) -> None:
        """Gradients of a linear layer's input and weight."""
        self.matmul(tokens, features_in, features_out)
        self.matmul(features_in, features_out, tokens)

    def attention(self, shape: _costs.AttentionShape, which: _costs.Pass) -> None:
        """One pass of fused attention."""
        self._add(_costs.attention_ns(self.gpu, shape, which, self.dtype), 1)

    def convolution(
        self, shape: _costs.ConvolutionShape, which: _costs.ConvolutionPass, *, times: int = 1
    ) -> None:
        """``times`` passes of a convolution."""
        self._add(_costs.convolution_ns(self.gpu, shape, which, self.dtype), times)

    def _add(self, duration_ns: int, times: int) -> None:
        self.device_ns += duration_ns * times
        self.kernels += times
