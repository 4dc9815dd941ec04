"""The life of an adapter after a run."""
