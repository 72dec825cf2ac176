"""Measurements: each module is a command, ``python -m bench.NAME``; figures go to bench/results."""
