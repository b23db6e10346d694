"""Benchmarks of the operations and of whole training steps; see README.md."""
