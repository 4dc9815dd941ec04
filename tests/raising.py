"""That an error has its code, beside its class: the code is what operators, scripts and the other end see."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedlora.core.codes import Code
from fedlora.core.errors import FedLoRAError


@contextmanager
def raising(kind: type[FedLoRAError], *, code: Code, match: str | None = None) -> Iterator[pytest.ExceptionInfo[FedLoRAError]]:
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert caught.value.code == code
