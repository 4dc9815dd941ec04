"""What lies beside a published adapter: how it was trained and has to be asked, and the server's signature."""
