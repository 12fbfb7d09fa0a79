"""Parameter-efficient fine-tuning: a frozen model whose linear maps are changed by a few new weights."""
