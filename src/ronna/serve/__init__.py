"""Models at work: text from a trained model."""
