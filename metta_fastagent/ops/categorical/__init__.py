"""Categorical distributions over logits: score given actions, draw new ones, apply masks and temperatures."""
