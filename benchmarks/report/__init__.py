"""Tables and plots of results, targets, and comparisons between two runs."""
