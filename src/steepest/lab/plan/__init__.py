"""`steepest plan`."""
