"""Tensors of tests are small, so memory-lean training has no smallest size here."""

import pytest

from qsd.lean import switch


@pytest.fixture(autouse=True)
def tensors_of_all_sizes(monkeypatch):
    monkeypatch.setattr(switch, "SMALLEST", 0)
