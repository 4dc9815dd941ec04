"""Pages about runs: their figures, tables and words, and the one template."""
