"""What everybody speaks of. Pure: no I/O, no clock, no randomness."""

__all__: list[str] = []
