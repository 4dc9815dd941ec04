"""Every byte and file that FORMAT.md specifies."""

__all__: list[str] = []
