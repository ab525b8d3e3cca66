"""Dense linear algebra on batches ``[..., m, n]``; no optimizer in sight."""
