"""Child processes: kept running, ended with their parent, and why one is not there."""
