"""Training: the tuner, its optimizers, the trainer."""
