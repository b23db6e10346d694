"""Agents written with the mixin."""

from metta_fastagent.agents.fast import Fast

__all__ = ["Fast"]
