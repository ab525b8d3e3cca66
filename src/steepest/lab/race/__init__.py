"""`steepest race`."""
