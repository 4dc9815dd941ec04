"""What a base model is made of and what it can do: files, digest, names, layers to adapt, limits. Loads and trains nothing."""
