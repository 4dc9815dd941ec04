"""What is asked of a simulation before it begins: seeds, and to go on with what is there."""
