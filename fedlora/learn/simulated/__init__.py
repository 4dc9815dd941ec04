"""What a simulation trains on: rows from files, dealt to sites."""
