"""The types that all other folders use. Pure: no I/O, no clock, no randomness."""
