"""Every byte and file that FORMAT.md specifies."""
