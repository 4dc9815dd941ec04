"""What is said of one site: the words for how it stands, what its commands answer and its events tell."""
