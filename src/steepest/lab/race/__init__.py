"""The command ``steepest race``: contenders train the same model on the same data, with equal tuning."""
