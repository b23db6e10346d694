"""Observation tokens: their grid of features, and a convolution of it straight from the tokens."""
