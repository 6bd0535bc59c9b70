"""The process around the kernels: import, threads, fork, backends, types, memory."""

import ast
import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest

import bnext
from bnext import _core
from bnext import functional as F
from cases import BACKENDS, data


def python(code, **environment):
    """Run `code` in a fresh interpreter; its standard output, or an error with all it said."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


# What the first operation of a process has to say of its environment.
FIRST_ERROR = """
import bnext, numpy as np
try:
    bnext.functional.batch_norm_forward(np.eye(3, dtype=np.float32))
except ValueError as error:
    print(error)
"""


# -- import ----------------------------------------------------------------------------------------


def test_import_needs_numpy_alone():
    code = """
import sys
sys.modules.update(dict.fromkeys(
    ["matplotlib", "safetensors", "sklearn", "threadpoolctl", "tqdm", "torch", "scipy"]))
import bnext, numpy as np
layer = bnext.nn.Sequential(bnext.nn.Linear(4, 3), bnext.nn.BatchNorm(3), bnext.nn.ReLU())
y, backward = layer.forward(np.eye(4, dtype=np.float32))
print(backward(y).shape)
"""
    assert python(code) == "(4, 4)"


def test_import_leaves_subnormals_alone():
    code = """
import numpy as np
tiny = np.float32(1e-40)
def alive():
    return bool((np.full(64, tiny) * np.float32(1) != 0).all())
before = alive()
import bnext
from bnext import functional as F
x = np.full((64, 2, 300), tiny)
y, saved = F.batch_norm_forward(np.arange(600, dtype=np.float32).reshape(2, 3, 100))
z = F.batch_norm_inference(x, np.zeros(2, "f"), np.ones(2, "f"), eps=0)
d, _ = F.dropout_forward(x, 1e-9)
print(before, alive(), bool((z == tiny).all()), bool((d == tiny).all()))
"""
    for name in BACKENDS:
        assert python(code, BNEXT_BACKEND=name) == "True True True True"


def test_import_leaves_what_it_does_not_need_for_later():
    code = """
import sys, bnext
print([name for name in bnext._MODULES if f"bnext.{name}" in sys.modules])
print(*sorted({"compare", "losses"} & set(dir(bnext))))
from bnext import *
print(compare.__module__, doctor.__module__, bnext.losses.__name__, hasattr(bnext, "nothing"))
"""
    loaded, shown, used = python(code).split("\n")
    assert loaded == "[]"
    assert shown == "compare losses"
    assert used == "bnext.comparison bnext.diagnosis._doctor bnext.losses False"


def test_every_public_module_is_an_attribute():
    names = {module.name for module in pkgutil.iter_modules(bnext.__path__)}
    public = {name for name in names if not name.startswith("_")}
    # A program, and what needs more than NumPy to be of use.
    for name in public - {"cli", "study", "torch"}:
        assert getattr(bnext, name).__name__ == f"bnext.{name}"


def test_import_twice_in_one_process_is_harmless():
    code = "import bnext, importlib; importlib.reload(bnext); print(bnext.__version__)"
    assert python(code) == bnext.__version__


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_environment_forces_a_backend(name):
    code = "import bnext; from bnext import _core; print(_core.backend())"
    assert python(code, BNEXT_BACKEND=name) == name


def test_unknown_backend_in_the_environment_is_a_clear_error():
    said = python(FIRST_ERROR, BNEXT_BACKEND="sse1")
    assert said == f"backend: no backend 'sse1' on this machine; available: {', '.join(BACKENDS)}"


def test_best_backend_is_the_default():
    code = "import bnext; from bnext import _core; print(_core.backend())"
    assert python(code, BNEXT_BACKEND="") == BACKENDS[-1]


def test_bits_do_not_depend_on_the_size_of_the_cache():
    """What exceeds the cache is written past it and fetched ahead, and while it holds some channels
    the sums of the next ones are made on the way: other code, same results."""
    code = """
import hashlib
import numpy as np
import bnext
from bnext import functional as F
from cases import ACTIVATIONS, DTYPES, HALF_DTYPES, SHAPES, parameter_dtype
digest = hashlib.sha256()
rng = np.random.default_rng(0)
for shape, axis in SHAPES:
    for dtype in (*DTYPES, *HALF_DTYPES):
        x, g = rng.normal(size=(2, *shape)).astype(dtype)
        options = {"channel_axis": axis, "activation": ACTIVATIONS[len(shape) % len(ACTIVATIONS)]}
        row = rng.normal(1, 0.1, shape[axis]).astype(parameter_dtype(dtype))
        for array in (x, x[1:]):  # aligned, and hardly
            residual = {"residual": g[: len(array)]}
            for more in (
                {},
                {"dropout": 0.3, "activation": "relu"},
                {**residual, "activation": "relu"},
                {**residual, "dropout": 0.3},
            ) if array.size > shape[axis] else ():
                generator = bnext.Generator(1)
                y, saved = F.batch_norm_forward(
                    array, row, row, **{**options, **more}, generator=generator)
                grads = F.batch_norm_backward(g[: len(array)], saved)
                for result in (y, grads.x, grads.weight, grads.bias, grads.residual):
                    if result is None:
                        continue
                    digest.update(result.tobytes())
            digest.update(F.batch_norm_inference(array, row, row**2, **options).tobytes())
            y, _ = F.dropout_forward(array, 0.3, generator=bnext.Generator(1))
            digest.update(y.tobytes())
print(digest.hexdigest())
"""
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    for name in BACKENDS:
        run = partial(python, code, BNEXT_BACKEND=name, PYTHONPATH=path)
        assert len({run(BNEXT_CACHE_BYTES=size) for size in ("1", "100000", str(1 << 40))}) == 1


def test_size_of_the_cache_must_be_a_number():
    for wrong in ("32M", "0", "-1"):
        said = python(FIRST_ERROR, BNEXT_CACHE_BYTES=wrong)
        assert said == f"BNEXT_CACHE_BYTES: expected bytes, got '{wrong}'"


def test_show_config(capsys):
    bnext.show_config()
    said = capsys.readouterr().out
    assert bnext.__version__ in said
    assert f"{_core.backend()} (in use)" in said
    for name, _ in _core.backends():
        assert name in said


# -- threads ---------------------------------------------------------------------------------------


def test_number_of_threads(restore_threads):
    if not _core.has_openmp():
        bnext.set_num_threads(4)
        assert bnext.get_num_threads() == 1
        return
    bnext.set_num_threads(3)
    assert bnext.get_num_threads() == 3


@pytest.mark.skipif(not _core.has_openmp(), reason="compiled without OpenMP: always one thread")
def test_default_number_of_threads_follows_the_environment():
    code = "import bnext; print(bnext.get_num_threads())"
    assert python(code, OMP_NUM_THREADS="3") == "3"
    if hasattr(os, "sched_setaffinity"):
        pinned = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + code
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        run = subprocess.run(
            [sys.executable, "-c", pinned], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == "1"


def test_calls_from_many_python_threads():
    x = data((16, 7, 30, 30))
    y, saved = F.batch_norm_forward(x)
    grad = F.batch_norm_backward(x, saved).x
    same = []

    def work():
        for _ in range(10):
            z, mine = F.batch_norm_forward(x)
            same.append(np.array_equal(z, y))
            same.append(np.array_equal(F.batch_norm_backward(x, mine).x, grad))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 160


def test_threads_that_share_a_generator_get_offsets_of_their_own():
    generator = bnext.Generator(1)
    x = np.ones(100, np.float32)
    offsets = []

    def work():
        for _ in range(100):
            offsets.append(F.dropout_forward(x, generator=generator)[1].offset)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offsets) == list(range(800))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use():
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np, bnext
from bnext import functional as F
bnext.set_num_threads(4)
x = np.random.default_rng(0).normal(size=(32, 8, 50, 50)).astype(np.float32)
expected = F.batch_norm_forward(x)[0]
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(F.batch_norm_forward(x)[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(F.batch_norm_forward(x)[0], expected)
print("done")
"""
    assert python(code) == "done"


# -- memory ----------------------------------------------------------------------------------------


def test_nothing_leaks():
    resource = pytest.importorskip("resource", reason="this system does not tell memory use")
    x, small = data((8, 4, 32, 32)), data((4, 3))

    def work(count):
        for _ in range(count):
            _, saved = F.batch_norm_forward(x)
            F.batch_norm_backward(x, saved)
            F.dropout_forward(x.transpose(1, 0, 2, 3))
            for _ in range(20):
                F.batch_norm_forward(small)
                with pytest.raises(ValueError, match="eps"):
                    F.batch_norm_forward(small, eps=-1)

    work(50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(500)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # KiB; one x is 128 KiB, and 500 are 64 MiB


@pytest.fixture
def buffers():
    """The statistics of the buffers; their limit is as before afterwards."""
    limit = bnext.buffer_stats()["limit"]
    yield bnext.buffer_stats
    bnext.set_buffer_limit(limit)


def test_results_reuse_memory_without_page_faults(buffers):
    resource = pytest.importorskip("resource", reason="counts page faults, on POSIX only")
    x = np.ones((16, 64, 56, 56), np.float32)

    def step():
        y, saved = F.batch_norm_forward(x)
        F.batch_norm_backward(y, saved)
        F.dropout_forward(x)
        F.batch_norm_inference(x, saved.mean, saved.var)

    step()
    step()
    before, faults = buffers(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    made = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    after = buffers()
    assert made < 20  # the results have 12,544 pages
    assert after["made"] == before["made"]
    assert after["reused"] == before["reused"] + 4


def test_reused_memory_belongs_to_one_array_at_a_time(buffers):
    x = np.ones((4, 64, 32, 32), np.float32)
    first = F.dropout_forward(x, 0)[0]
    kept = first[1, :, ::2]  # a view holds the memory
    address = first.ctypes.data
    del first
    second = F.dropout_forward(2 * x, 0)[0]
    assert second.ctypes.data != address
    assert (kept == 1).all()
    assert (second == 2).all()
    assert second.flags.writeable
    assert second.ctypes.data % 64 == 0
    del kept
    third = F.dropout_forward(3 * x, 0)[0]
    assert third.ctypes.data == address


def test_buffers_stay_within_their_limit(buffers):
    x = np.ones((4, 64, 32, 32), np.float32)
    bnext.set_buffer_limit(x.nbytes)
    results = [F.dropout_forward(x)[0] for _ in range(3)]
    results.clear()
    assert buffers()["kept"] <= x.nbytes
    bnext.set_buffer_limit(0)
    assert buffers()["kept"] == 0
    made = buffers()["made"]
    F.dropout_forward(x)
    F.dropout_forward(x)
    assert buffers()["made"] == made + 2


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**80, ValueError), (1.5, TypeError), (None, TypeError)]
)
def test_bad_buffer_limits(buffers, value, error):
    with pytest.raises(error, match="set_buffer_limit: bytes: expected"):
        bnext.set_buffer_limit(value)


def test_out_of_memory_is_a_memory_error():
    x = np.broadcast_to(np.float32(1), (2**20, 2**20, 4))
    with pytest.raises(MemoryError):
        F.dropout_forward(x)


# -- types and documentation -----------------------------------------------------------------------


def stub():
    text = pathlib.Path(_core.__file__).with_name("_core.pyi")
    if not text.exists():  # an editable install keeps it with the sources
        text = pathlib.Path(bnext.__file__).with_name("_core.pyi")
    return ast.parse(text.read_text())


def test_stub_names_what_the_module_has():
    named = set()
    for node in stub().body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            named.add(node.target.id)
    public = {name for name in vars(_core) if not name.startswith("_")} | {"__version__"}
    assert {name for name in named if not name.startswith("_") or name == "__version__"} == public


@pytest.mark.parametrize("name", [n for n in F.__all__ if hasattr(_core, n) and n != "activations"])
def test_stub_has_the_arguments_of_the_function(name):
    function = getattr(F, name)
    if inspect.isclass(function):
        members = {n.name for c in stub().body if getattr(c, "name", "") == name for n in c.body}
        assert members - {"__init__"} == {n for n in vars(function) if not n.startswith("_")}
        return
    node = next(n for n in stub().body if getattr(n, "name", "") == name)
    signature = function.__doc__.splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    names = [part.split(":")[0].strip() for part in inside.split(", ")]
    wanted = [argument.arg for argument in node.args.args]
    wanted += ["*"] * bool(node.args.kwonlyargs) + [a.arg for a in node.args.kwonlyargs]
    assert names == wanted


@pytest.mark.parametrize("name", [n for n in F.__all__ if n != "activations"])
def test_everything_public_is_documented(name):
    assert len(getattr(F, name).__doc__ or "") > 40


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.walk_packages(bnext.__path__, "bnext.")]
)
def test_examples_in_docstrings(name):
    if name.startswith("bnext.torch"):
        pytest.importorskip("torch", reason="bnext.torch is for PyTorch; pip install bnext[torch]")
    if name not in ("bnext._core", "bnext.__main__"):  # __main__ runs the command
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_example_of_the_package():
    assert doctest.testmod(bnext).failed == 0


def test_examples_of_the_functions():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = 0
    for name in F.__all__:
        for test in finder.find(getattr(F, name), name, globs={}):
            examples += len(test.examples)
            runner.run(test)
    assert examples >= 8
    assert runner.failures == 0
