"""Results as a table for notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.core.errors import NotInstalled
from fedlora.core.records import Results

if TYPE_CHECKING:
    import pandas as pd


def results_frame(results: Sequence[Results] | str | os.PathLike[str]) -> pd.DataFrame:
    """One row for each seed, arm and site of a simulation; scores on the site's own rows.

    Args:
        results: what :func:`fedlora.simulate` returns, or the directory that it has written.

    Returns:
        Columns ``seed``, ``arm``, ``site`` and the fields of :class:`fedlora.core.records.Score`: ``nll`` (nats per supervised
        token), ``exact_match``, ``coarse_match`` (shares), ``tokens``, ``examples``; NaN where nothing was measured.

    Raises:
        NotInstalled: pandas is missing.
        StoreError: the directory has no results.
    """
    if isinstance(results, str | os.PathLike):
        from fedlora.lab.report import load

        results = load(Path(results))
    try:
        import pandas as pd
    except ImportError:
        raise NotInstalled("pandas", extra="report", what="tables of results") from None
    rows = [
        {"seed": one.seed, "arm": name, "site": site, **score.model_dump()}
        for one in results
        for name, arm in one.arms.items()
        for site, score in arm.sites.items()
    ]
    return pd.DataFrame(rows)
