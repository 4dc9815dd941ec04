"""What is told of a deployment: how its runs and its sites stand."""
