"""The server's only open door: who may call, how often, and with what certificate."""
