"""A site's half of a run."""
