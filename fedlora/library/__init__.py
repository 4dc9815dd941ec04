"""The life of an adapter after a run."""

__all__: list[str] = []
