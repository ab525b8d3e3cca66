"""`steepest bench`."""
