"""Existing models that sleep: those of transformers, and ports of two that are not in it."""
