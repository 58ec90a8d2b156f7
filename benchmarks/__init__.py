"""Measurements of neurosens: each module is a script that prints a table for docs/benchmarks.md."""
