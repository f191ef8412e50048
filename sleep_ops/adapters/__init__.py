"""Existing models that sleep: Hugging Face hybrids, and ports of models that have no code to build on."""
