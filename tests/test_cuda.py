"""Arrays of a GPU, and what is said where there is none."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

import bnext
from bnext import _core, _device
from bnext import functional as F
from cases import DTYPES, HALF_DTYPES, data, dtype_name, needs_cuda, parameters, using

dtypes = pytest.mark.parametrize("dtype", DTYPES + HALF_DTYPES, ids=dtype_name)
available = dict(_core.backends())["cuda"]
without_cuda = pytest.mark.skipif(available, reason="CUDA is available")


def gpu(cases):
    """Marks a test that needs a device."""
    for mark in needs_cuda:
        cases = mark(cases)
    return cases


# -- without a device ------------------------------------------------------------------------------


@without_cuda
def test_a_machine_without_a_device_says_why(capsys):
    reason = _core.cuda_unavailable_reason()
    assert reason
    bnext.show_config()
    said = capsys.readouterr().out
    assert f"CUDA      {reason}" in said
    assert "cuda (not on this machine)" in said
    with pytest.raises(ValueError, match="no backend 'cuda' on this machine"):
        _core.set_backend("cuda")


class Interface:
    """Any library's array of a GPU."""

    def __init__(self, pointer, shape, typestr="<f4", **more):
        self.__cuda_array_interface__ = {
            "data": (pointer, False), "shape": shape, "typestr": typestr, "version": 3, **more,
        }  # fmt: skip


@without_cuda
@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.batch_norm_forward(x),
        lambda x: F.batch_norm_inference(x, x, x),
        lambda x: F.dropout_forward(x),
        lambda x: F.alpha_dropout_forward(x),
    ],
)
def test_arrays_of_a_device_raise_and_the_process_goes_on(call):
    with pytest.raises(RuntimeError, match="CUDA: "):
        call(Interface(4096, (4, 3)))
    F.batch_norm_forward(np.ones((4, 3), np.float32))


def test_the_default_backend_is_one_of_the_processor():
    assert _core.backend() != "cuda"


# -- on a device, through the protocols ------------------------------------------------------------


def to_device(array, device=0):
    """A copy on the device, as an array that only has the protocols."""
    x = np.ascontiguousarray(array)
    # A dropout with p=0 copies, and so does staging: the library has no copies of its own.
    there = _core.DeviceArray.empty(x.shape, x.dtype.name, device, 0)
    _copy(there.pointer, x.ctypes.data, x.nbytes)
    return there


def to_host(array, dtype=None):
    x = np.empty(array.shape, dtype or np.dtype(array.dtype))
    _copy(x.ctypes.data, array.pointer, x.nbytes)
    return x


def _copy(to, source, count):
    """By the driver's own function, or, where devices are emulated, as memory."""
    if os.environ.get("BNEXT_EMULATED_CUDA"):
        ctypes.memmove(to, source, count)
        return
    driver = ctypes.CDLL("libcuda.so.1")
    pointers = [ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(count)]
    assert driver.cuCtxSynchronize() == 0
    assert driver.cuMemcpy(*pointers) == 0


@gpu
@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"activation": "silu", "residual": True},
        {"activation": "leaky_relu", "residual": True, "dropout": 0.25},
        {"activation": "gelu", "channel_axis": -1},
    ],
    ids=str,
)
def test_device_arrays_give_what_host_arrays_give(dtype, options):
    options = dict(options)
    axis = options.get("channel_axis", 1)
    shape = (6, 5, 9, 7)
    x, g = data(shape, axis, dtype), data(shape, axis, dtype, seed=9)
    weight, bias = parameters(shape[axis], dtype)
    if options.pop("residual", False):
        options["residual"] = data(shape, axis, dtype, seed=4)
    with using("cuda"):
        y, saved = F.batch_norm_forward(x, weight, bias, generator=bnext.Generator(1), **options)
        grads = F.batch_norm_backward(g, saved)
    on_device = {
        name: to_device(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    z, kept = F.batch_norm_forward(
        to_device(x), to_device(weight), to_device(bias), generator=bnext.Generator(1), **on_device
    )
    assert to_host(z, dtype).tobytes() == y.tobytes()
    assert kept.count == saved.count
    assert 0 <= kept.nbytes - saved.nbytes <= 2  # bits are kept in pairs of bytes
    assert to_host(kept.moments[0]).tobytes() == saved.moments[0].tobytes()
    there = F.batch_norm_backward(to_device(g), kept)
    for name in ("x", "weight", "bias", "residual"):
        actual, wanted = getattr(there, name), getattr(grads, name)
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert to_host(actual, wanted.dtype).tobytes() == wanted.tobytes()


@gpu
@dtypes
@pytest.mark.parametrize("mask_shape", [None, (6, 5, 1, 1), (1, 5, 9, 7), (6, 1, 1, 1)])
@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_dropout_draws_the_mask_of_the_processor(dtype, mask_shape, p):
    x = data((6, 5, 9, 7), 1, dtype)
    for name in ("dropout_forward", "alpha_dropout_forward"):
        operation = getattr(F, name)
        y, saved = operation(x, p, mask_shape=mask_shape, generator=bnext.Generator(3))
        z, kept = operation(to_device(x), p, mask_shape=mask_shape, generator=bnext.Generator(3))
        assert to_host(z, dtype).tobytes() == y.tobytes()
        assert (kept.seed, kept.offset, kept.mask_shape) == (
            saved.seed, saved.offset, saved.mask_shape,
        )  # fmt: skip
        grad = F.dropout_backward(to_device(x), kept)
        assert to_host(grad, dtype).tobytes() == F.dropout_backward(x, saved).tobytes()


@gpu
def test_a_seed_in_the_memory_of_the_device():
    x = data((40, 50))
    seed = to_device(np.array([77], np.uint64).view(np.float64))
    y, _ = _device.dropout_forward(to_device(x), 0.5, None, _device.Draw(0, 3, seed), None)
    generator = bnext.Generator(77)
    generator.state = {"seed": 77, "offset": 3}
    assert to_host(y).tobytes() == F.dropout_forward(x, generator=generator)[0].tobytes()


@gpu
def test_protocols_lead_to_the_same_memory():
    x = to_device(data((4, 3, 5)))
    interface = x.__cuda_array_interface__
    assert interface["data"][0] == x.pointer
    assert interface["shape"] == (4, 3, 5)
    again = _core.DeviceArray.from_dlpack(x.__dlpack__())
    assert (again.pointer, again.shape, again.dtype) == (x.pointer, (4, 3, 5), "float32")
    seen = Interface(x.pointer, (4, 3, 5))
    y, _ = F.batch_norm_forward(seen)
    assert to_host(y).tobytes() == to_host(F.batch_norm_forward(x)[0]).tobytes()


@gpu
def test_in_place_and_again_from_the_result():
    x = data((8, 3, 50))
    g = data((8, 3, 50), seed=3)
    there = to_device(x)
    y, saved = F.batch_norm_forward(there, out=there)
    assert y is there
    expected, kept = F.batch_norm_forward(x)
    assert np.allclose(to_host(y), expected, atol=1e-6)
    grads = F.batch_norm_backward(to_device(g), saved)
    assert np.allclose(to_host(grads.x), F.batch_norm_backward(g, kept).x, atol=1e-5)


@gpu
def test_arguments_are_checked_before_anything_runs():
    x, w = to_device(data((4, 3, 5))), to_device(np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"batch_norm_forward: weight: expected shape \(3,\)"):
        F.batch_norm_forward(x, w)
    with pytest.raises(TypeError, match="weight: expected an array of a GPU, as the data"):
        F.batch_norm_forward(x, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="grad_y"):
        F.batch_norm_backward(np.ones((4, 3, 5), np.float32), F.batch_norm_forward(x)[1])
    with pytest.raises(ValueError, match="expected a C-contiguous array"):
        F.dropout_forward(Interface(x.pointer, (4, 3), strides=(4, 16)))
    with pytest.raises(TypeError, match="expected dtype"):
        F.dropout_forward(Interface(x.pointer, (4, 3), typestr="<i4"))
    with pytest.raises(ValueError, match="out: overlaps x in part"):
        F.dropout_forward(
            Interface(x.pointer, (10,)), out=Interface(x.pointer + 4, (10,)),
        )  # fmt: skip
    with pytest.raises(ValueError, match="memory of a GPU"):
        F.dropout_forward(Interface(np.ones(3).ctypes.data, (3,)))


@gpu
def test_empty_arrays():
    x = to_device(np.ones((0, 3, 5), np.float32))
    y, saved = F.batch_norm_forward(x, to_device(np.ones(3, np.float32)))
    assert y.shape == (0, 3, 5)
    assert np.isnan(to_host(saved.moments[0])).all()
    grads = F.batch_norm_backward(x, saved)
    assert (to_host(grads.weight) == 0).all()


# -- of the emulation, which can be told what a device is like -------------------------------------

emulated = pytest.mark.skipif(
    not os.environ.get("BNEXT_EMULATED_CUDA"), reason="needs a build that emulates devices"
)


def python(code, **environment):
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


SETUP = """
import numpy as np
from bnext import functional as F, _core
from test_cuda import to_device, to_host, data
"""


@emulated
def test_memory_that_is_not_there_is_a_memory_error():
    code = (
        SETUP
        + """
x = to_device(data((64, 64, 8)))
try:
    F.batch_norm_forward(x, activation="relu", residual=x, dropout=0.5)
except MemoryError as error:
    print(error)
small = to_device(data((2, 2)))
print(F.dropout_forward(small)[0].shape)
"""
    )
    said = python(code, BNEXT_EMULATED_MEMORY="200000").splitlines()
    assert said == ["CUDA: allocating memory: out of memory", "(2, 2)"]


@emulated
def test_arrays_of_two_devices():
    code = (
        SETUP
        + """
x, w = to_device(data((4, 3, 5)), device=1), to_device(np.ones(3, np.float32), device=0)
try:
    F.batch_norm_forward(x, w)
except ValueError as error:
    print(error)
print(F.batch_norm_forward(x)[0].device)
"""
    )
    said = python(code, BNEXT_EMULATED_DEVICES="2").splitlines()
    assert said[0] == (
        "batch_norm_forward: weight: expected an array in cuda:1 as the data, got one in cuda:0"
    )
    assert said[1] == "1"


# In the emulation of two multiprocessors: channels that one block keeps, that several share, that
# all share in several rounds, and that are read twice; rows of columns that begin anywhere.
LARGE = [
    ((16, 8, 40, 40), 1), ((9, 5, 61, 67), 1), ((3, 2, 150, 301), 1), ((40, 70, 50, 3), 1),
    ((900, 3), 1), ((30000, 2), 1), ((70, 33, 31, 17), -1), ((20, 37, 41, 64), -1),
    ((61, 67, 130), -1), ((5000, 7), -1), ((3001, 11, 3), -1),
]  # fmt: skip


@gpu
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(np.float32, None), (np.float32, "relu"), (HALF_DTYPES[0], "silu")],
    ids=lambda value: dtype_name(value) if isinstance(value, type) else value,
)
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)
def test_large_tensors(shape, axis, dtype, activation):
    x, grad_y = (data(shape, axis, seed=seed).astype(dtype) for seed in (1, 2))
    weight, bias = parameters(shape[axis], np.float32)

    def results(backend):
        with using(backend):
            y, saved = F.batch_norm_forward(
                x, weight, bias, channel_axis=axis, activation=activation
            )
            grads = F.batch_norm_backward(grad_y, saved)
        return y, *saved.moments, grads.x, grads.weight, grads.bias

    tolerance = 2e-5 if dtype == np.float32 else 2e-2
    for _ in range(2):  # counters are as they were
        for actual, wanted in zip(results("cuda"), results("x86-64"), strict=True):
            actual, wanted = actual.astype(np.float64), wanted.astype(np.float64)
            difference = np.abs(actual - wanted) / (1 + np.abs(wanted))
            # Gradients jump where an activation is at its kink.
            assert (difference > tolerance).mean() < 1e-4
            assert np.median(difference) < tolerance / 8


@emulated
def test_devices_with_less_shared_memory():
    code = (
        SETUP
        + """
_core.set_backend("cuda")
x = data((16, 8, 40, 40))
y = F.batch_norm_forward(x)[0]
_core.set_backend("x86-64")
print(abs(y - F.batch_norm_forward(x)[0]).max() < 1e-6)
"""
    )
    assert python(code, BNEXT_EMULATED_SHARED="64") == "True"


# -- the modules for PyTorch -----------------------------------------------------------------------

torch = pytest.importorskip("torch", exc_type=ImportError)
from torch import nn  # noqa: E402

import bnext.torch  # noqa: E402
from bnext.torch import _bridge  # noqa: E402


class TensorsOfTheEmulation(_device._Torch):
    """Tensors in main memory, which is that of emulated devices."""

    def view(self, x, where):
        return self.of_tensor(x, 0)

    def stream(self, x):
        return 0


@pytest.fixture
def device(monkeypatch):
    """Where tensors are for the CUDA backend: on the GPU, or on the CPU if that plays one."""
    if torch.cuda.is_available():
        return "cuda"
    if not os.environ.get("BNEXT_EMULATED_CUDA"):
        pytest.skip("PyTorch has no GPU")
    monkeypatch.setattr(_bridge, "on_gpu", lambda x: True)
    monkeypatch.setitem(_device._LIBRARIES, "torch", TensorsOfTheEmulation())
    return "cpu"


memory_formats = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


@gpu
@memory_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_modules_on_a_gpu(device, dtype, memory_format, training):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 9, 7).to(dtype).to(memory_format=memory_format)
    ours, theirs = bnext.torch.BatchNorm2d(5), nn.BatchNorm2d(5)
    results = []
    for layer, where in ((ours, device), (theirs, "cpu")):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        layer.to(where, wide).train(training)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 5))
        # PyTorch's results of half types are rounded more than once: compare with float32's.
        given = x.detach().to(where, dtype if layer is ours else wide).requires_grad_()
        y = layer(given)
        y.backward(torch.cos(3 * x.to(y.dtype)).to(where))
        results.append(
            [t.detach().cpu().to(torch.float64) for t in (
                y, given.grad, layer.weight.grad, layer.bias.grad, layer.running_mean,
                layer.running_var)]
        )  # fmt: skip
    unit = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
    for actual, wanted in zip(*results, strict=True):
        assert torch.allclose(actual, wanted, rtol=unit, atol=unit * float(wanted.abs().max() + 1))


@gpu
@memory_formats
def test_fused_module_on_a_gpu(device, memory_format):
    layer = bnext.torch.BatchNormAct2d(5, activation="relu", dropout=0.4).to(device)
    x, r = torch.randn(2, 6, 5, 9, 7, device=device).unbind()
    x = x.to(memory_format=memory_format).detach().requires_grad_()
    r = r.to(memory_format=memory_format).detach().requires_grad_()
    y = layer(x, r)
    assert y.is_contiguous(memory_format=memory_format)
    kept = y != 0
    z = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True) + r
    assert torch.allclose(y, torch.where(kept, z / 0.6, 0.0), atol=1e-5)
    grads = torch.autograd.grad(y.square().sum(), (x, r, layer.weight))
    wanted = torch.autograd.grad(
        torch.where(kept, z / 0.6, 0.0).square().sum(), (x, r, layer.weight)
    )
    for actual, expected in zip(grads, wanted, strict=True):
        assert torch.allclose(actual, expected, atol=1e-3, rtol=1e-4)


@gpu
@pytest.mark.parametrize("kind", ["Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"])
def test_dropout_modules_on_a_gpu(device, kind):
    layer = getattr(bnext.torch, kind)(0.5)
    x = torch.randn(8, 5, 9, 7, device=device, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    assert torch.equal(y, layer(x))
    assert not torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    factors = set(np.round(grad.detach().cpu().numpy().ravel(), 5))
    assert len(factors) == 2
    assert 0 in factors


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU")
def test_a_captured_graph_draws_new_masks():
    layer = bnext.torch.BatchNormAct2d(5, dropout=0.5).cuda()
    x = torch.randn(6, 5, 9, 7, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert ((first != 0) != (y != 0)).any()
    x.copy_(2 * x + 1)
    graph.replay()
    both = (first != 0) & (y != 0)
    assert torch.allclose(first[both], y[both], atol=1e-3)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of some releases of PyTorch itself
def test_autocast_and_compile_on_a_gpu():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bnext.torch.BatchNorm2d(8), nn.ReLU()).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = model(x)
    assert y.dtype is torch.float16
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    compiled(x).sum().backward()
