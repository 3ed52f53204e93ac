"""Studies behind decisions: which codes states are stored in, and what storage choices cost."""
