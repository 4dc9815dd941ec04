"""Simulations, reports and toys. Nothing of a deployment imports this."""
