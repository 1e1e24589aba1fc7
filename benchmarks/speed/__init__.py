"""Speed benchmarks; README.md in this folder says how they measure and how to run them."""
