"""``steepest tune``: learning rates and decay for one optimizer on a task of one's own."""
