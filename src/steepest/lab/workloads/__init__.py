"""Things to train."""
