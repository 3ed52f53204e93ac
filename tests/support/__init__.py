"""What the tests share: the table of optimizers, references, cases, and comparisons."""
