"""Child processes: kept running, ended with their parent, and why one is not there."""

__all__: list[str] = []
