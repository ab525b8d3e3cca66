"""Stacks: matrices of one shape as one tensor, with their state."""
