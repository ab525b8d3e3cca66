"""Parts that rules share."""
