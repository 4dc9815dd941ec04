"""A site's half of a run."""

__all__: list[str] = []
