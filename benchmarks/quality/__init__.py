"""Does it work? Experiments on real data: ``make quality``, or ``python -m benchmarks.quality.run``."""
