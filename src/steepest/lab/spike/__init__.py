"""The command ``steepest spike``: a study of one gradient that is a thousand times too large."""
