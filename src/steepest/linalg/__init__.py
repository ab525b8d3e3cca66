"""Dense linear algebra on batches ``[..., m, n]`` that knows no optimizer."""
