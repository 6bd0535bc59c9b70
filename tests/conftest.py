import pytest

import bnext
from cases import BACKENDS, CUDA, using


@pytest.fixture(params=[*BACKENDS, CUDA])
def backend(request):
    """Every backend that this machine can run, one after the other."""
    with using(request.param):
        yield request.param


@pytest.fixture
def restore_threads():
    before = bnext.get_num_threads()
    yield
    bnext.set_num_threads(before)
