"""What goes on, told to people."""
