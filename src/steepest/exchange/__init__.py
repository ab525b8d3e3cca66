"""Where a stack is computed, and how gradients get there and directions back."""
