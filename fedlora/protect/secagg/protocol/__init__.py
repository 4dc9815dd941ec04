"""The messages of a session and their cryptography (FORMAT.md, section 10): pure functions without state or I/O."""
