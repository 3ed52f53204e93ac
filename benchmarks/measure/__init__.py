"""What is measured, whose steps, and how they are timed."""
