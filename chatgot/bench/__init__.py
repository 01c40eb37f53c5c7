"""Benchmarks, started by launch/bench.py."""
