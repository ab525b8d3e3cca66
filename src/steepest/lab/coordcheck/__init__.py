"""The command ``steepest coord-check``: how sizes in a network move with its width."""
