"""Sites of a simulation that run in its own process."""
