"""The SDK without a provider: each process asks the API for itself."""

from __future__ import annotations

from bench.contestants import Place


def make(_place: Place, _poll_interval_s: float) -> None:
    """No provider."""
