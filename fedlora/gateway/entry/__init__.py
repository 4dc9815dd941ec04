"""A site's way in: how far its request to join has come, and how long an answer to it is waited for."""
