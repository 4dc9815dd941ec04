"""The bundle's client app. It refuses to run, because sites never run bundles."""

from __future__ import annotations

from fedlora.core.errors import PlanRefused
from fedlora.flower.libraries import ClientApp


class _Refuses(ClientApp):  # type: ignore[misc]  # flwr is untyped here
    def __call__(self, message: object, context: object) -> object:
        raise PlanRefused("a site does not run bundles", hint="start the site with `fedlora site up`")


app = _Refuses()
