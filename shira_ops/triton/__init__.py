"""Triton kernels, a module for each family."""
