"""Studies of pruning and distillation."""
