"""Child processes: kept running, ended with their parent, and the causes if one is missing."""
