"""Observation tokens: their feature grid, and its convolution directly from the tokens."""
