import pytest

import bnext
from bnext import _core
from cases import BACKENDS, CUDA


@pytest.fixture(params=[*BACKENDS, CUDA])
def backend(request):
    """Every backend that this machine can run, one after the other."""
    before = _core.backend()
    _core.set_backend(request.param)
    yield request.param
    _core.set_backend(before)


@pytest.fixture
def restore_threads():
    before = bnext.get_num_threads()
    yield
    bnext.set_num_threads(before)
