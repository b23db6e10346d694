"""Proximal policy optimization: advantages and loss."""
