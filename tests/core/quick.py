"""Operands for which a quick root or quotient may be wrong where the approximation that it begins
with is a unit off. That of hardware is not for these, or compilers' own divisions were wrong."""

HARDEST_ROOTS = ("0x1.9a2854p+1", "0x1.b5c076p+1", "0x1.dd26e4p+1", "0x1.f82294p+0")
"""Times any power of four."""

HARDEST_DIVISORS = ("0x1.fffffep+23", "0x1.fffffap+23")
"""Times any power of two."""
