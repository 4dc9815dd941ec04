"""Limits that several parts use, each defined once. FORMAT.md, section 1.5, has those of the bytes."""

MAX_SITES = 256
"""Most sites of a federation: recipients of an envelope, sites on a roster, members of a session."""
MAX_RANK = 512
"""Largest LoRA rank, in a plan and in an adapter on its way."""
MAX_PLAN_BYTES = 65_536
"""Longest canonical plan."""
