"""Measures a machine and writes a hardware profile of it: ``spillover bench --profile-out``."""

from spillover.bench._profile import BenchOptions, measure_profile, write_profile

__all__ = ["BenchOptions", "measure_profile", "write_profile"]
