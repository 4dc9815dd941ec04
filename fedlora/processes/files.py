"""How many files a process may have open: each connection is one."""

from __future__ import annotations

import resource
import sys

from fedlora.core.errors import ResourceError


def allow_open_files(needed: int, *, at_most: int, whose: str) -> None:
    """Raises this process's own (soft) limit, which its children inherit, up to the one that the system sets (the hard one).

    Args:
        needed: files at a time.
        at_most: that may be needed later.
        whose: names who needs them, in the error.

    Raises:
        ResourceError: the system allows fewer than ``needed``.
    """
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(at_most, hard)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            soft = wanted
        except (ValueError, OSError):  # a system with a further limit than the one that it states
            hard = soft
    if soft < needed:
        raise ResourceError(
            f"{whose} may need {needed} open files at a time, and this system allows {hard} (RLIMIT_NOFILE)",
            hint="allow more: `LimitNOFILE=` in its systemd unit, `ulimit -Hn` or /etc/security/limits.conf elsewhere",
        )
