"""Models, their data, and the shapes of well-known models' parameters."""
