"""What keeps a site from taking part: one list of findings, for `site doctor`, `check --site` and `site up`."""
