"""The benchmark of losses: forward and backward pass, their memory, and whole iterations."""
