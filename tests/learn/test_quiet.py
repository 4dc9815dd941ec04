"""Nothing of ours shows a progress bar of transformers, and a notebook's own stay as they were."""

import pytest
from transformers.utils import logging

from fedlora.learn.bases.quiet import without_bars
from fedlora.learn.toy import toy_base

pytestmark = pytest.mark.torch


@pytest.fixture(params=[True, False])
def bars(request):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if request.param else logging.disable_progress_bar)()
    yield request.param
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_the_toy_base_is_made_in_silence(tmp_path, capfd, bars):
    toy_base(tmp_path / "toy")
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert logging.is_progress_bar_enabled() == bars


@without_bars()
def fails():
    assert not logging.is_progress_bar_enabled()
    raise ValueError("no base")


def test_bars_are_as_before_also_after_an_error(bars):
    with pytest.raises(ValueError, match="no base"):
        fails()
    assert logging.is_progress_bar_enabled() == bars
