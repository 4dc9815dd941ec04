"""What a training script of somebody's own hands over to a federation."""
