"""`steepest optimizers` and `steepest check`."""
