"""Crashes of durable stores, on a simulated disk and by kill -9."""
