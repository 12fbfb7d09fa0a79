"""What a run will need, by arithmetic alone: no torch, no weights, no data."""
