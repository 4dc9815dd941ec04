"""What users know a model by: pure functions of what it said."""
