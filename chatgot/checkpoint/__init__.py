"""Saving, loading and keeping checkpoints."""
