import random

import numpy as np
import pytest
import torch

import qsd  # noqa: F401 - makes the model names known


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
