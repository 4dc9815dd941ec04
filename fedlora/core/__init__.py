"""What everybody speaks of. Pure: no I/O, no clock, no randomness."""
