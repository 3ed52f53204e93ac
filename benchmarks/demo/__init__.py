"""The demo: two real models trained by torch.optim and by fusedopt, side by side."""
