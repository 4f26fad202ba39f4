"""Checkpoint formats of other projects. `sparsify` is also the format of our exports."""

__all__ = ["sparsify"]
