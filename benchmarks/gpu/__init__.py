"""Correctness and speed on a GPU, section by section; `gpu.session` runs them."""
