"""Helpers shared by the tests: small networks, trainings, exported files, OpenMMLab's options."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DATA = ROOT / "tests" / "data"

# `make test-long` sets this: the same tests on every value and with many more tries, where `make test` takes a sample.
LONG = os.environ.get("QSD_TEST_LONG", "") == "1"
# For tests whose claim a shorter test makes too, in a smaller setting.
long = pytest.mark.skipif(not LONG, reason="it is long; `make test-long` runs it")


def sample(short, whole):
    """What a test is parametrised by: a few values, and all of them in ``make test-long``."""
    return whole if LONG else short
