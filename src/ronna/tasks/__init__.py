"""Tasks: what a model is fine-tuned to do, and the numbers that say how well it does it."""
