"""Adapters on a live model: switched, mixed, taken back."""
