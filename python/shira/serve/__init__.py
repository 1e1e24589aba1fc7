"""Adapters on a live model: switched, mixed, taken off again."""
