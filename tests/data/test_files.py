"""Any file gives rows or an error with a name, and neither ever quotes a row."""

import random
import traceback

import pytest
from data.files import CANARY, made

from fedlora.core.errors import DataError
from fedlora.data import read


def told(error: BaseException) -> str:
    """All that an error and those behind it say."""
    chain, seen = [error], set()
    for e in chain:
        if id(e) not in seen:
            seen.add(id(e))
            chain += [other for other in (e.__cause__, e.__context__) if other is not None]
    return "".join(f"{e!r} {e} {getattr(e, 'hint', '')}" for e in chain) + "".join(traceback.format_exception(error))


def tried(rng: random.Random, directory) -> str:
    """What reading one made file comes to: ``rows`` or ``refused``."""
    path, settings = made(rng, directory)
    refused: DataError | None = None
    try:
        conversations, report = read(path, **settings)
    except DataError as e:
        refused = e
    path.unlink()
    if refused is not None:
        said = told(refused)
        assert CANARY not in said, (path, settings)
        assert refused.hint, said
        assert "the reader of" not in said, said
        assert refused.__context__ is None
        return "refused"
    assert len(conversations) == report.used == report.rows - len(report.bad) > 0
    assert CANARY not in "".join(report.lines())
    return "rows"


def many(seed: int, count: int, directory) -> None:
    rng = random.Random(seed)
    outcomes = [tried(rng, directory) for _ in range(count)]
    assert min(outcomes.count("rows"), outcomes.count("refused")) > count // 10


def test_hundreds_of_files_give_rows_or_a_named_error(tmp_path):
    many(0, 300, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 21))])
def test_a_hundred_thousand_files_give_rows_or_a_named_error(tmp_path, seed):
    many(seed, 5_000, tmp_path)
