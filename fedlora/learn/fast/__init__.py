"""Training that is fast. All of training works without it."""

__all__: list[str] = []
