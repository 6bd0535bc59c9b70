"""PyTorch's own list of module tests, `torch.testing._internal.common_modules.module_db`, for ours.

What is checked for each of its inputs is what PyTorch's test/test_modules.py checks on the CPU.
"""

import copy
import io
import itertools
import pickle

import pytest

torch = pytest.importorskip("torch", reason='bnext.torch needs PyTorch: pip install "bnext[torch]"')
pytest.importorskip("expecttest", reason="PyTorch's test lists need it: pip install expecttest")

from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import noncontiguous_like  # noqa: E402

import bnext.torch as bt  # noqa: E402

INFOS = [info for info in module_db if info.module_cls.__name__ in bt.__all__]


def cases():
    """(ModuleInfo, training, number of the input in its list)"""
    for info in INFOS:
        for training in (True, False):
            for number in range(len(inputs_of(info, torch.float64, training))):
                yield info, training, number


def inputs_of(info, dtype, training):
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


def name_of(case):
    info, training, number = case
    mode = "train" if training else "eval"
    return f"{info.module_cls.__name__}-{mode}-{number}"


@pytest.fixture(params=list(cases()), ids=name_of)
def case(request):
    """(ours, theirs, inputs) in float64, with the same parameters."""
    info, training, number = request.param
    torch.manual_seed(0)
    given = inputs_of(info, torch.float64, training)[number]
    args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
    theirs = info.module_cls(*args, **kwargs, dtype=torch.float64).train(training)
    cls = getattr(bt, info.module_cls.__name__)
    ours = cls(*args, **kwargs, dtype=torch.float64).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, given.forward_input.args


def test_the_list_has_what_it_should():
    assert {info.module_cls.__name__ for info in INFOS} >= {
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
    }


def test_forward_and_state(case):
    ours, theirs, args = case
    for _ in range(2):
        assert_close(ours(*args), theirs(*args))
    assert_close(ours.state_dict(), theirs.state_dict())
    assert repr(ours) == repr(theirs)


def test_forward_in_float32(case):
    ours, theirs, args = case
    args = [x.detach().float() for x in args]
    assert_close(ours.float()(*args), theirs.float()(*args))


def test_grad_and_gradgrad(case):
    ours, _, args = case

    def function(*inputs):
        return ours(*inputs[: len(args)])

    inputs = (*args, *ours.parameters())
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(function, inputs, fast_mode=True)


def test_pickle_and_state_dict(case):
    ours, _, args = case
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert_close(other(*args), copy.deepcopy(ours)(*args))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file))


def test_noncontiguous_inputs_and_gradients(case):
    ours, theirs, args = case
    if not args[0].numel():
        pytest.skip("an empty tensor has no strides to speak of")
    strided = [noncontiguous_like(x.detach()).requires_grad_() for x in args]
    y, expected = ours(*strided), theirs(*args)
    assert_close(y, expected)
    grad = torch.randn_like(y)
    leaves = (*strided, *ours.parameters()), (*args, *theirs.parameters())
    assert_close(
        torch.autograd.grad(y, leaves[0], noncontiguous_like(grad)),
        torch.autograd.grad(expected, leaves[1], grad),
    )


def test_memory_format(case):
    ours, theirs, (x,) = case
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if memory_format is None:
        pytest.skip("no memory format of this rank")
    leaf = x.detach().to(memory_format=memory_format).requires_grad_()
    y = ours.to(memory_format=memory_format)(leaf)
    assert y.is_contiguous(memory_format=memory_format)
    assert_close(y, theirs(x))
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert x.numel() == 0 or grad.is_contiguous(memory_format=memory_format)


def errors():
    for info in INFOS:
        if info.module_error_inputs_func is None:
            continue
        for training in (True, False):
            yield from (
                (info, error)
                for error in info.module_error_inputs_func(
                    info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
                )
            )


@pytest.mark.parametrize("case", list(errors()), ids=lambda case: case[0].module_cls.__name__)
def test_errors(case):
    info, error = case
    constructor, forward = (
        error.module_error_input.constructor_input,
        error.module_error_input.forward_input,
    )
    cls = getattr(bt, info.module_cls.__name__)
    if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(*constructor.args, **constructor.kwargs)
        return
    module = cls(*constructor.args, **constructor.kwargs, dtype=torch.float64)
    with pytest.raises(error.error_type, match=error.error_regex):
        module(*forward.args, **forward.kwargs)


@pytest.mark.parametrize("cls", [getattr(bt, name) for name in bt.__all__ if name[0] in "BS"])
def test_factory_arguments(cls):
    module = cls(3, dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    meta = cls(3, device="meta", dtype=torch.float16)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta.to_empty(device="cpu").weight.dtype == torch.float16


# -- what PyTorch's test/nn/test_dropout.py checks -----------------------------------------
DROPOUTS = [getattr(bt, name) for name in bt.__all__ if "Dropout" in name]


@pytest.mark.parametrize("cls", [bt.Dropout, bt.AlphaDropout])
def test_dropout_keeps_the_order_of_axes_in_memory(cls):
    torch.manual_seed(0)
    for order in itertools.permutations(range(4)):
        back = [order.index(axis) for axis in range(4)]
        for part in (slice(None), slice(1, None)):
            x = torch.ones(3, 4, 5, 6).permute(order).contiguous().permute(back)[:, part]
            for p in (1e-10, 0.3, 0.7):
                y = cls(p)(x)
                assert y.permute(order).is_contiguous()
                assert torch.equal(x, y) == (p == 1e-10)


@pytest.mark.parametrize("cls", [bt.Dropout2d, bt.FeatureAlphaDropout])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_channel_dropout_keeps_the_memory_format(cls, memory_format, inplace):
    torch.manual_seed(0)
    for x in (
        torch.ones(10, 7, 5, 3).to(memory_format=memory_format),
        torch.ones(10, 7, 5, 6).to(memory_format=memory_format)[..., ::2],
    ):
        y = cls(0.5, inplace)(x.clone() if x.is_contiguous() else x)
        assert inplace or y.is_contiguous(memory_format=memory_format)
        assert (y == y[:, :, :1, :1]).all()  # whole channels
        assert y.unique().numel() == 2


@pytest.mark.parametrize(("cls", "shape"), [(bt.Dropout1d, (50, 2)), (bt.Dropout3d, (50, 2, 2, 2))])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_of_a_sample_is_that_of_a_batch_of_one(cls, shape, inplace):
    x = torch.rand(shape)
    torch.manual_seed(0)
    expected = cls()(x[None])[0]
    torch.manual_seed(0)
    y = cls(0.5, inplace)(x)
    assert torch.equal(y, expected)
    assert (y is x) == inplace


@pytest.mark.parametrize(
    ("cls", "shape", "warning"),
    [
        (bt.Dropout2d, (1, 2, 2, 2, 2), "Received a 5-D input to dropout2d"),
        (bt.Dropout2d, (1, 2), "Received a 2-D input to dropout2d"),
        (bt.Dropout2d, (1, 2, 2), "assuming that channel-wise 1D dropout behavior is desired"),
        (bt.Dropout3d, (1, 2, 2), "Received a 3-D input to dropout3d"),
    ],
)
def test_dropout_warns_of_ranks(cls, shape, warning):
    with pytest.warns(UserWarning, match=warning):
        cls()(torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (2,)], ids=str)
def test_dropout1d_refuses_ranks(shape):
    with pytest.raises(RuntimeError, match=f"2D or 3D input, but received a {len(shape)}D input"):
        bt.Dropout1d()(torch.rand(shape))


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    ("cls", "shape"), [(bt.AlphaDropout, (5000,)), (bt.FeatureAlphaDropout, (1000, 5, 2, 3, 4))]
)
def test_alpha_dropout_keeps_mean_and_deviation(cls, shape, p):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    y = cls(p)(x)
    assert abs(y.mean() - x.mean()) < 0.1
    assert abs(y.std() - x.std()) < 0.1
    y.backward(x)


@pytest.mark.parametrize("cls", DROPOUTS)
def test_dropout_of_nothing(cls):
    shape = {"1": (0, 3, 2), "2": (0, 3, 2, 2), "3": (0, 3, 2, 2, 2)}.get(cls.__name__[-2], (0, 3))
    assert cls()(torch.ones(shape)).shape == shape
