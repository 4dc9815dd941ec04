"""The page of a site: what it has done, from what it keeps itself."""
