"""One file for each optimizer: its signature and documentation."""
