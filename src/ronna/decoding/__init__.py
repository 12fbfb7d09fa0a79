"""From a trained model to text: sampling, beams, streams."""
