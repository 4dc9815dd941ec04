"""What the messages of a session say and prove, FORMAT.md 10: computed from their arguments alone, no state, no I/O."""
