"""Which 8-bit codes suit the states of Adam: candidates, what they cost, and the tables of it."""
