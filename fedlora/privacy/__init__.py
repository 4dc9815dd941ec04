"""Differential privacy that a site owns: terms, draws, coding, accounting, the privacy ledger."""
