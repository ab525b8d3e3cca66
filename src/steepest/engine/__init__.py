"""The engine: parameter groups in, moved weights out."""
