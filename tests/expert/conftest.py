"""One torch thread: on a busy machine two threads wait for each other in every small product, minutes in all."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
