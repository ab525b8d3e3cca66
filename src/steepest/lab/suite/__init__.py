"""The command ``steepest suite``: every contender, tuned with the same number of trials, on ten workloads."""
