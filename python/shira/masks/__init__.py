"""Masks: which entries of a weight an adapter may change. See `shira.masks.masks` for what they have in common."""

from shira.masks.masks import (
    DEFAULT_SEED,
    Given,
    Grad,
    Mask,
    Principal,
    Rand,
    Snip,
    Struct,
    WeightMagnitude,
    default,
    from_description,
)

__all__ = [
    "DEFAULT_SEED",
    "Given",
    "Grad",
    "Mask",
    "Principal",
    "Rand",
    "Snip",
    "Struct",
    "WeightMagnitude",
    "default",
    "from_description",
]
