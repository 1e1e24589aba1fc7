"""Benchmarks: ``speed`` measures how long things take, ``quality`` whether adapters learn."""
