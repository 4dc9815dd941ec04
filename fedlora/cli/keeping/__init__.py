"""What keeps a federation: who joins and leaves, the server's log, backups, repair."""
