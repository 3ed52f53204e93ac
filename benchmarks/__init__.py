"""Benchmarks of fusedopt against torch.optim, and a demo on real data."""
