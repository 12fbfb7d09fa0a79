"""Ronna: train larger language models on the compute you have, and carry them all the way to use."""

__version__ = "0.1.0"
