"""What is run on a machine with an NVIDIA GPU."""
