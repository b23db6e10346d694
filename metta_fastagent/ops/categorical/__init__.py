"""Categorical distributions of logits: scoring given actions, drawing new ones, masks and temperatures."""
