"""Other shapes: transformation, checkpoints, torch state dicts, the stateful adapter."""
