"""What a coordinator sees of a running server and can ask of it, from another process on the same host."""
