"""Flower's relay, as it is: a module of ours loads it in two thirds of the time that its own command takes."""

from __future__ import annotations


def main() -> None:
    """Runs the command ``flower-superlink``."""
    from fedlora.flower._internals.superlink import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    main()
