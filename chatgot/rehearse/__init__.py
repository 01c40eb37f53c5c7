"""Rehearsing a run with a small model on this machine's CPU before a queue gives it a larger one."""
