"""Training a model's values: the tuner, its optimizers, the trainer."""
