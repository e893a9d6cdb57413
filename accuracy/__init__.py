"""BF16 against a variant: token agreement, tasks, the gate."""
