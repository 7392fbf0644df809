"""Fixtures that several test files share."""

import pytest
from helpers.browser import browser  # noqa: F401


@pytest.fixture(scope="module")
def one_thread():
    """Exact comparisons of a network with itself: sums in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
