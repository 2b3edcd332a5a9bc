"""Steps, losses, optimizers, and what a run leaves."""
