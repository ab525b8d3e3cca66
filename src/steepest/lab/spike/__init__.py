"""`steepest spike`."""
