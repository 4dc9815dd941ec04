"""Simulations, reports and toys. Nothing of a deployment imports this."""

__all__: list[str] = []
