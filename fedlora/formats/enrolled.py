"""The sites of a federation as the server knows them: a directory of public files."""

from __future__ import annotations

from pathlib import Path

from fedlora.core.errors import ConfigError, KeyFileError
from fedlora.core.limits import MAX_SITES
from fedlora.core.messages import check_site_name
from fedlora.formats.keys import PublicIdentity, load_public


def load_enrolled(directory: Path) -> dict[str, PublicIdentity]:
    """The sites whose public files lie in a server's ``sites`` directory.

    Raises:
        ConfigError: there is none, or more than a task can be sealed to.
        KeyFileError: a file is malformed, named after another site than it holds, or holds a key of another site: two equal
            recipients would make every site refuse every task.
    """
    found: dict[str, PublicIdentity] = {}
    for path in sorted(directory.glob("*.pub")):
        public = load_public(path)
        if check_site_name(public.name) != path.stem:
            raise KeyFileError(
                f"{path.name} holds the key of {public.name!r}",
                hint="a file is named after its site: ask its owner for the .pub file again",
            )
        for other in found.values():
            if public.signing == other.signing or public.kem == other.kem:
                raise KeyFileError(
                    f"{public.name} and {other.name} share a key", hint="one of them copied it: ask both for their fingerprints"
                )
        found[public.name] = public
    if len(found) > MAX_SITES:
        raise ConfigError(f"{len(found)} sites are enrolled in {directory}; a task can be sealed to {MAX_SITES}")
    if not found:
        raise ConfigError(
            f"no site is enrolled in {directory}",
            hint="put the .pub file of each site there; `fedlora keygen site` makes it at the site",
        )
    return found
