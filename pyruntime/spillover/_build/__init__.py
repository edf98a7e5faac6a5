"""Compiles the parts that are bound to the installed torch, once, and keeps them in a cache."""

from spillover._build._cache import cache_folder, clean
from spillover._build._parts import Part, build, build_all, find

__all__ = ["Part", "build", "build_all", "cache_folder", "clean", "find"]
