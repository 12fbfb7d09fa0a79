"""The verbs that do not train: what the command line and `ronna.NAME()` call."""
