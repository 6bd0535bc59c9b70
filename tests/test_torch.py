"""bnext.torch: modules for PyTorch against those of torch.nn."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

import bnext
from bnext import _core
from bnext import functional as F

torch = pytest.importorskip("torch", reason='bnext.torch needs PyTorch: pip install "bnext[torch]"')

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import bnext.torch as bt  # noqa: E402
from bnext.torch import _autograd, _bridge, _library  # noqa: E402

# Steps of 16-bit numbers; of others, what PyTorch loses by summing float32 in float32.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
ACTIVATIONS = list(_core.activations)
CASES = [  # (rank of the module, shape)
    (1, (6, 5)),
    (1, (2, 1)),
    (1, (4, 3, 7)),
    (2, (3, 1, 1, 1)),
    (2, (2, 5, 1, 1)),
    (2, (3, 5, 7, 7)),
    (2, (2, 33, 13, 11)),
    (3, (2, 4, 3, 2, 5)),
]
LAYOUTS = ["contiguous", "last", "sliced", "expanded"]
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensor(shape, dtype=torch.float32, layout="contiguous", offset=1.0):
    x = torch.randn(shape, dtype=torch.float64) * 2 + offset
    x = x.to(dtype)
    if layout == "last" and len(shape) > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded":
        return x[..., :1].expand(shape)
    return x


def close(actual, expected, dtype, unit=1.0):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs() / (unit + expected.double().abs())
    assert not error.isnan().any()
    assert error.max() <= TOLERANCE[dtype]


def pair(rank, features, dtype=torch.float32, **options):
    """The same BatchNorm, theirs and ours, with parameters for data of `dtype`."""
    theirs = getattr(torch.nn, f"BatchNorm{rank}d")(features, **options)
    ours = getattr(bt, f"BatchNorm{rank}d")(features, **options)
    theirs.to(_bridge.parameter_dtype(dtype))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.to(_bridge.parameter_dtype(dtype)).load_state_dict(theirs.state_dict())
    return theirs, ours


def is_ours(y):
    return type(y.grad_fn).__name__ == "BatchNormBackward" and isinstance(
        y.grad_fn, _autograd.BatchNorm._backward_cls
    )


# -- BatchNorm ---------------------------------------------------------------------------------
@dtypes
@layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_trains_and_evaluates_as_theirs(case, dtype, layout):
    rank, shape = case
    theirs, ours = pair(rank, shape[1], dtype)
    for training in (True, True, False):
        theirs.train(training)
        ours.train(training)
        x, g = tensor(shape, dtype, layout), tensor(shape, dtype)
        leaves = x.clone().requires_grad_(), x.detach().requires_grad_()
        expected, y = theirs(leaves[0]), ours(leaves[1])
        assert is_ours(y)
        close(y, expected, dtype)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(ours)(leaves[1]), y)
        for module in (theirs, ours):
            module.zero_grad()
        expected.backward(g)
        y.backward(g)
        unit = max(
            1, float((theirs.weight / (theirs.running_var + 1e-5).sqrt()).detach().abs().max())
        )
        # A gradient is a difference of numbers of the size of weight / std.
        close(leaves[1].grad, leaves[0].grad, dtype, 10 * unit)
        close(ours.weight.grad, theirs.weight.grad, dtype, shape[0] * 10)
        close(ours.bias.grad, theirs.bias.grad, dtype, shape[0] * 10)
        for key, value in theirs.state_dict().items():
            close(ours.state_dict()[key], value, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "eps": 0.1},
    ],
    ids=str,
)
def test_options(options):
    theirs, ours = pair(2, 3, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training in (True, True, True, False):
        theirs.train(training)
        ours.train(training)
        x = tensor((4, 3, 5, 2)).requires_grad_()
        y = ours(x)
        assert is_ours(y)
        close(y, theirs(x), torch.float32)
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value, torch.float32)


def test_one_value_per_channel_raises_and_changes_nothing():
    norm = bt.BatchNorm2d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.ones(1, 3, 1, 1))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.eval()(torch.ones(1, 3, 1, 1)).round(), torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2, 2)], ids=str)
def test_wrong_ranks_raise_as_theirs(shape):
    with pytest.raises(ValueError, match=f"expected 4D input .got {len(shape)}D input"):
        bt.BatchNorm2d(3)(torch.ones(shape))


def test_wrong_channels_raise_and_change_no_statistics():
    norm = bt.BatchNorm2d(5)
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements not 5"):
        norm(torch.ones(4, 3, 2, 2))
    assert torch.equal(norm.running_mean, torch.zeros(5))


def test_statistics_may_move_before_backward():
    norm = bt.BatchNorm2d(3).eval()
    x = tensor((4, 3, 5, 5)).requires_grad_()
    (expected,) = torch.autograd.grad(norm(x).sum(), x)
    y = norm(x)
    norm.train()(x.detach() + 9)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_variance_that_float32_cannot_hold():
    norm = bt.BatchNorm2d(3)  # and nothing warns
    y = norm(torch.tensor([1e30, -1e30]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    close(y.abs(), torch.ones(2, 3, 1, 1), torch.float32)
    assert norm.running_var.isinf().all()


@pytest.mark.parametrize("eps", [float("inf"), float("nan")])
def test_odd_eps_is_as_theirs(eps):
    theirs, ours = pair(2, 3, eps=eps)
    x = tensor((4, 3, 5, 5))
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_backward_has_one_gradient_for_hooks():
    y = bt.BatchNorm2d(3)(tensor((4, 3, 5, 5)).requires_grad_())
    seen = []
    y.grad_fn.register_prehook(seen.extend)
    y.sum().backward()
    assert len(seen) == 1


# Of PyTorch itself.
jit_warns = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@jit_warns
def test_what_the_core_does_not_take_is_theirs():
    theirs, ours = pair(2, 3)
    x = torch.randn(0, 3, 4, 4)
    assert ours(x).shape == x.shape  # empty
    jvp = [
        torch.func.jvp(norm, (tensor((2, 3, 4, 4)),), (torch.ones(2, 3, 4, 4),))
        for norm in (theirs.eval(), ours.eval())
    ]
    close(jvp[1][1], jvp[0][1], torch.float32)
    x = tensor((4, 2, 3, 4, 4))
    close(torch.vmap(ours)(x), torch.vmap(theirs)(x), torch.float32)
    with torch.device("meta"):
        assert bt.BatchNorm2d(3)(torch.empty(2, 3, 4, 4)).is_meta
        assert bt.Dropout()(torch.empty(4)).is_meta


# -- BatchNormAct ------------------------------------------------------------------------------
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_fused_is_the_composition(activation, has_residual, layout, dtype):
    shape = (3, 5, 4, 3)
    fused = bt.BatchNormAct2d(5, activation=activation, dropout=0.3)
    fused.to(_bridge.parameter_dtype(dtype))
    plain = torch.nn.BatchNorm2d(5).to(_bridge.parameter_dtype(dtype))
    assert list(fused.state_dict()) == list(plain.state_dict())
    g = tensor(shape, dtype)
    for training in (True, False):
        fused.train(training)
        plain.train(training)
        x, residual = (tensor(shape, dtype, layout).requires_grad_() for _ in range(2))
        given = (x, residual) if has_residual else (x,)
        torch.manual_seed(5)
        y = fused(*given)
        assert y.stride() == x.stride()
        grads = torch.autograd.grad(y, (*given, fused.weight, fused.bias), g)
        # The mask of the same seed, in the order of memory.
        torch.manual_seed(5)
        mask = bt.Dropout(0.3)(torch.ones_like(x, dtype=torch.float64, requires_grad=False))
        wide = [value.detach().double().requires_grad_() for value in given]
        expected = plain.double()(wide[0])
        expected = expected if len(wide) == 1 else expected + wide[1]
        expected = _bridge.ACTIVATIONS[activation](expected, 0.01) * (mask if training else 1)
        close(y, expected.to(dtype), dtype)
        wanted = torch.autograd.grad(expected, (*wide, plain.weight, plain.bias), g.double())
        for grad, want in zip(grads, wanted, strict=True):
            close(grad, want.to(grad.dtype), dtype, 20)
        plain.to(_bridge.parameter_dtype(dtype))


def test_fused_repr_and_errors():
    assert repr(bt.BatchNormAct2d(3, dropout=0.1)).endswith("activation='relu', dropout=0.1)")
    with pytest.raises(ValueError, match=r"BatchNormAct2d: activation: expected one of \(None, "):
        bt.BatchNormAct2d(3, activation="tanh")
    with pytest.raises(ValueError, match=r"BatchNormAct2d: dropout: expected a number in \[0, 1\]"):
        bt.BatchNormAct2d(3, dropout=1.5)
    with pytest.raises(TypeError, match="BatchNormAct2d: dropout: expected a number, got str"):
        bt.BatchNormAct2d(3, dropout="a")
    with pytest.raises(ValueError, match="BatchNormAct2d: negative_slope: expected a finite"):
        bt.BatchNormAct2d(3, negative_slope=float("nan"))


def test_fused_without_the_core_is_the_same():
    norm = bt.BatchNormAct2d(3, activation="silu").eval()
    x, residual = torch.randn(2, 4, 3, 2, 2)
    close(torch.func.vmap(norm)(x[None], residual[None])[0], norm(x, residual), torch.float32)


# -- gradients of all orders ---------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_gradients_and_their_gradients(activation, has_residual, training):
    norm = bt.BatchNormAct2d(2, activation=activation, dropout=0.3).double().train(training)
    shape = (2, 2, 2, 2)

    def function(x, weight, bias, residual=None):
        torch.manual_seed(1)
        arguments = (x,) if residual is None else (x, residual)
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, arguments)

    inputs = [torch.randn(s, dtype=torch.float64) for s in (shape, 2, 2, shape)]
    inputs = [x.requires_grad_() for x in inputs[: 4 if has_residual else 3]]
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


def dropouts():
    """(module, shape of input, shape of its mask)"""
    return [
        (bt.Dropout(0.3), (4, 5), (4, 5)),
        (bt.Dropout(0.3), (2, 3, 4, 2), (2, 3, 4, 2)),
        (bt.Dropout1d(0.3), (6, 5, 3), (6, 5, 1)),
        (bt.Dropout2d(0.3), (4, 5, 2, 2), (4, 5, 1, 1)),
        (bt.Dropout3d(0.3), (4, 5, 2, 1, 2), (4, 5, 1, 1, 1)),
        (bt.AlphaDropout(0.3), (4, 5, 6), (4, 5, 6)),
        (bt.FeatureAlphaDropout(0.3), (6, 7, 4), (6, 7, 1)),
        (bt.FeatureAlphaDropout(0.3), (6, 7), (6, 7)),
    ]


each_dropout = pytest.mark.parametrize(
    "case", dropouts(), ids=lambda case: f"{type(case[0]).__name__}-{len(case[1])}d"
)


@each_dropout
def test_dropout_gradients_of_all_orders(case):
    module, shape, _ = case
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(x):
        torch.manual_seed(1)
        return module(x)

    assert type(function(x).grad_fn).__name__ == "DropoutBackward"
    assert torch.autograd.gradcheck(function, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_batched_grad=True)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_results_lie_as_those_of_pytorch(rank):
    """In any order of axes, with gaps or without, so that ``view`` works where it did."""
    shape = (4, 6, 3, 5, 2)[:rank]
    dimensions = max(rank - 2, 1)
    ours, theirs = (getattr(module, f"BatchNorm{dimensions}d")(6) for module in (bt, torch.nn))
    for order in itertools.permutations(range(rank)):
        back = [order.index(axis) for axis in range(rank)]
        for step in (1, 2):
            x = torch.randn([step * shape[axis] for axis in order]).permute(back)
            x = x[(slice(None, None, step),) * rank]
            y, expected = ours(x), theirs(x)
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected)
    if rank == 4:  # one sample of an image whose channels lie last, and other axes of one
        image = torch.randn(7, 5, 6).permute(2, 0, 1).unsqueeze(0)
        narrow = torch.randn(4, 6, 1, 5).to(memory_format=torch.channels_last)
        for x in (image, narrow, narrow[..., :1], narrow[:1]):
            assert ours(x).stride() == theirs(x).stride()
    expanded = torch.randn(6, 8).expand(4, 6, 8)
    assert bt.Dropout(0.5)(expanded).is_contiguous()


def test_average_of_all_batches_in_float64():
    ours, theirs = (
        cls(1, momentum=None).double() for cls in (bt.BatchNorm1d, torch.nn.BatchNorm1d)
    )
    for mean in (2e6, 2e6 + 1, 2e6 + 2):
        x = torch.tensor([[mean - 1], [mean + 1]], dtype=torch.float64)
        ours(x), theirs(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-15, atol=0)


# -- Dropout -----------------------------------------------------------------------------------
@dtypes
@layouts
@each_dropout
def test_dropout_has_the_mask_of_its_seed(case, layout, dtype):
    module, shape, mask_shape = case
    x, g = tensor(shape, dtype, layout), tensor(shape, dtype)
    x.requires_grad_()
    state = torch.get_rng_state()
    y = module(x)
    y.backward(g)
    if x.is_contiguous() or _bridge.is_last(x):
        assert y.stride() == x.stride()

    torch.set_rng_state(state)
    seed = int(_bridge.draw_seed(x))
    last = layout == "last" and len(shape) > 2
    if last:
        mask_shape = (mask_shape[0], *mask_shape[2:], mask_shape[1])
    kept = torch.from_numpy(F.dropout_mask(seed, 0, mask_shape, 0.3))
    kept = kept.movedim(-1, 1) if last else kept
    scale, shift, dropped = 1 / 0.7, 0.0, 0.0
    if isinstance(module, torch.nn.AlphaDropout | torch.nn.FeatureAlphaDropout):
        saturation = -1.7580993408473766
        scale = (0.7 * (1 + 0.3 * saturation**2)) ** -0.5
        shift, dropped = -scale * 0.3 * saturation, scale * 0.7 * saturation
    expected = torch.where(kept, x.double() * scale + shift, dropped)
    close(y, expected.to(dtype), dtype)
    close(x.grad, torch.where(kept, g.double() * scale, 0).to(dtype), dtype)


@pytest.mark.parametrize(
    "name",
    ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_looks_and_evaluates_as_theirs(name, inplace):
    ours, theirs = (getattr(of, name)(0.25, inplace) for of in (bt, torch.nn))
    assert repr(ours) == repr(theirs)
    x = torch.ones([3, 4, 5, 2, 2][: int(name[-2]) + 2 if name[-1] == "d" else 3])
    assert ours.eval()(x) is x
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            getattr(bt, name)(p)
    state = torch.get_rng_state()
    assert getattr(bt, name)(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_keep_rate(p):
    y = bt.Dropout(p)(torch.ones(1000, 1000))
    rate = (y != 0).double().mean()
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5 + 1e-12
    if p < 1:
        assert torch.equal(y[y != 0].unique(), torch.tensor([1 / (1 - p)]))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_dropout_in_place(layout):
    x = tensor((3, 4, 5, 6), layout=layout)
    before = x.clone()
    version = x._version
    state = torch.get_rng_state()
    y = bt.Dropout(0.5, inplace=True)(x)
    assert y is x
    assert x._version > version
    torch.set_rng_state(state)
    assert torch.equal(x, bt.Dropout(0.5)(before))

    leaf = before.clone().requires_grad_()
    inner = leaf * 2
    torch.set_rng_state(state)
    bt.Dropout(0.5, inplace=True)(inner).sum().backward()
    assert torch.equal(leaf.grad, torch.where(x == 0, 0.0, 4.0))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        bt.Dropout(0.5, inplace=True)(leaf)
    part = (leaf * 2)[1:]
    bt.Dropout(1.0, inplace=True)(part)
    assert not part.any()


def refused_in_place():
    leaf = torch.ones(4, 5, requires_grad=True)
    yield "a leaf Variable that requires grad", leaf
    yield "a view of a leaf Variable that requires grad", leaf[:2]
    yield "the output of a function that returns multiple views", (leaf * 1).chunk(2)[0]


@pytest.mark.parametrize("case", list(refused_in_place()), ids=lambda case: case[0])
def test_dropout_in_place_is_refused_before_anything_changes(case):
    message, x = case
    with pytest.raises(RuntimeError, match=message):
        bt.Dropout(0.5, inplace=True)(x)
    assert (x == 1).all()


@pytest.mark.parametrize("cls", [bt.AlphaDropout, bt.FeatureAlphaDropout])
def test_alpha_dropout_is_never_in_place_as_theirs(cls):
    x = torch.ones(4, 5, 6, requires_grad=True)
    for given in (x, x.detach(), x.detach().movedim(1, -1)):
        assert (cls(0.5, inplace=True)(given) != 1).all()
        assert (given == 1).all()


def test_masks_differ_between_calls_and_follow_the_seed():
    drop = bt.Dropout()
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("other", [torch.arange(6), torch.ones(6, dtype=torch.complex64)])
def test_dtypes_that_the_core_has_not(other):
    y = torch.nn.Dropout(1.0)(other) if other.is_complex() else other
    if other.is_complex():
        assert torch.equal(bt.Dropout(1.0)(other), y)
    else:
        with pytest.raises(RuntimeError, match="cast"):
            bt.Dropout(0.5)(other)


# -- what happens around modules -------------------------------------------------------------------
def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        bt.BatchNormAct2d(4, dropout=0.2),
        torch.nn.Conv2d(4, 4, 3),
        bt.BatchNorm2d(4),
        torch.nn.ReLU(inplace=True),
        bt.Dropout2d(0.2),
        torch.nn.Flatten(),
        bt.AlphaDropout(0.2),
        torch.nn.Linear(4 * 16, 3),
    )


def passes(model, x, seed=7):
    """Output and gradients of a pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    # A sum of squares would not do: after a BatchNorm it is constant.
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_masks(use_reentrant):
    model = network()
    x = tensor((3, 2, 6, 6))
    expected = passes(copy.deepcopy(model), x)
    found = passes_through_checkpoint(model, x, use_reentrant)
    for grad, want in zip(found, expected, strict=True):
        close(grad, want, torch.float32)


def passes_through_checkpoint(model, x, use_reentrant):
    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    return passes(Checkpointed(), x)


def test_hooks_on_saved_tensors_see_all_and_free_the_input():
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x.clone()

    norm = bt.BatchNormAct2d(3, activation="relu")
    x = torch.randn(4, 3, 5, 5)
    residual = torch.randn(4, 3, 5, 5)
    expected = passes_with_residual(norm, x, residual)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = passes_with_residual(norm, x, residual)
    # x, weight, bias, mean, variance; and of the residual, for relu, bits
    assert sizes == [300, 3, 3, 3, 3, _core.passes_bytes(300)]
    for grad, want in zip(found, expected, strict=True):
        assert torch.equal(grad, want)


def passes_with_residual(norm, x, residual):
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y, leaves = norm(x, residual), (x, residual, norm.weight, norm.bias)
    return torch.autograd.grad(y, leaves, torch.arange(300.0).view_as(y))


def test_backward_frees_what_it_needed_and_may_run_twice_if_kept():
    norm = bt.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = norm(x)
    g = torch.randn(y.shape)
    first = torch.autograd.grad(y, x, g, retain_graph=True)[0]
    assert first.abs().max() > 0.1
    assert y.grad_fn.core is not None
    assert torch.equal(torch.autograd.grad(y, x, g)[0], first)
    assert y.grad_fn.core is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, g)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_changes_in_place_before_backward_are_noticed(changed):
    norm = bt.BatchNorm2d(3)
    leaf = torch.randn(4, 3, 5, 5, requires_grad=True)
    x = leaf * 1
    y = norm(x)
    with torch.no_grad():
        (x if changed == "x" else norm.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_may_be_changed_in_place():
    for layout in ("contiguous", "last"):
        x = tensor((3, 4, 5, 6), torch.float32, layout).requires_grad_()
        for module in (bt.BatchNorm2d(4), bt.Dropout(0.5)):
            torch.relu_(module(x)).sum().backward()


def test_copies_and_pickles():
    model = network()
    x = tensor((3, 2, 6, 6))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    expected = passes(model, x)
    for other in copies:
        for grad, want in zip(passes(other, x), expected, strict=True):
            assert torch.equal(grad, want)


def test_module_hooks_run():
    calls = []
    norm = bt.BatchNorm2d(3)
    norm.register_forward_hook(lambda *_: calls.append("forward"))
    norm.register_full_backward_hook(lambda *_: calls.append("backward"))
    norm(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_parameters_of_16_bits():
    for dtype in (torch.float16, torch.bfloat16):
        theirs, ours = pair(2, 3)
        x = tensor((4, 3, 5, 5), dtype).requires_grad_()
        y, expected = ours.to(dtype)(x), theirs.to(dtype)(x)
        assert is_ours(y)
        close(y, expected, dtype)
        y.sum().backward()
        assert ours.weight.grad.dtype == dtype
        close(ours.running_var, theirs.running_var, dtype)


def test_autocast():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), bt.BatchNorm2d(4), bt.Dropout(0.1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(3, 2, 6, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


# -- threads, processes ----------------------------------------------------------------------------
def test_threads_follow_pytorch(restore_threads):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            bt.Dropout()(torch.ones(3))
            assert bnext.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("imports", ["import torch, bnext", "import bnext, torch"])
def test_order_of_imports_does_not_matter(imports):
    code = f"""{imports}
import os
import bnext.torch
torch.set_num_threads(2)
torch.manual_seed(0)
x = torch.randn(64, 32, 28, 28)
norm, conv = bnext.torch.BatchNorm2d(32), torch.nn.Conv2d(32, 8, 3)
print(conv(norm(x)).sum().isfinite().item(), bnext.get_num_threads())
child = os.fork()  # as DataLoader does
if child == 0:
    os._exit(0 if norm(x).isfinite().all() and bnext.torch.Dropout()(x).any() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(conv(norm(x)).sum().isfinite().item())
"""
    assert run_python(code).split() == ["True", "2", "0", "True"]


def test_bnext_alone_does_not_import_torch():
    assert run_python("import bnext, sys; print('torch' in sys.modules)").strip() == "False"


def test_without_torch_the_error_names_the_extra():
    code = """import sys
sys.modules["torch"] = None
import bnext
try:
    import bnext.torch
except ImportError as error:
    print(error)
"""
    assert run_python(code).strip() == ('bnext.torch needs torch: pip install "bnext[torch]"')


class Normalized(torch.utils.data.Dataset):
    """Samples that went through modules in the worker."""

    def __init__(self):
        self.norm, self.drop = bt.BatchNorm1d(4), bt.Dropout(0.5)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.ones(64, 4, 200) * torch.arange(64)[:, None, None]
        return self.norm(x).detach(), self.drop(torch.ones(1000))


def test_workers_of_a_data_loader():
    expected, _ = Normalized()[0]  # the threads of this process are at work before the fork
    loader = torch.utils.data.DataLoader(
        Normalized(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    masks = []
    for x, mask in loader:
        assert torch.equal(x, expected)
        masks.append(mask)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)  # workers are seeded apart


# -- torch.compile ---------------------------------------------------------------------------------
def operators():
    for layout in ("contiguous", "last", "sliced"):
        x = tensor((3, 4, 5, 2), layout=layout).requires_grad_()
        residual = tensor((3, 4, 5, 2), layout=layout).requires_grad_()
        weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
        seed = torch.tensor(5)
        last = layout == "last"
        mean, var = torch.randn(4), torch.rand(4)
        yield _library.batch_norm, (x, weight, bias, None, None, 1e-5, last, None, 0.0, 0.0)
        yield _library.batch_norm, (x, None, None, residual, seed, 1e-5, last, "relu", 0.0, 0.3)
        yield _library.batch_norm, (x, weight, None, residual, None, 1e-5, last, None, 0.0, 0.0)
        yield (
            _library.batch_norm_inference,
            (x, weight, bias, residual, mean, var, 1e-5, last, "silu", 0.0),
        )
        yield _library.dropout, (x, seed, 0.3, last, False, False)
        yield _library.dropout, (x, seed, 0.3, last, True, True)


@pytest.mark.parametrize("case", list(operators()), ids=lambda case: case[0]._name[7:])
def test_opcheck(case):
    operator, arguments = case
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operators_have_the_gradients_of_eager_to_the_bit(activation, has_residual, by_batch):
    for dtype, last, dropout in itertools.product(TOLERANCE, (False, True), (0.0, 0.3)):
        x, residual, g = (tensor((3, 4, 5, 3), dtype, "last" if last else "") for _ in range(3))
        wide = _bridge.parameter_dtype(dtype)
        weight, bias, mean, var = torch.rand(4, 4, dtype=wide).unbind()
        leaves = [x, weight, bias, residual if has_residual else None]
        given = [value for value in leaves if value is not None]
        for value in given:
            value.requires_grad_()
        norm = _bridge.Norm(1e-5, last, activation, 0.01, dropout if by_batch else 0.0)
        if by_batch:
            y, *_ = _library.batch_norm(*leaves, torch.tensor(5), *norm)
            expected = _autograd.BatchNorm.apply(*leaves, None, None, 5, norm)
        else:
            y = _library.batch_norm_inference(*leaves, mean, var, *norm[:-1])
            expected = _autograd.BatchNorm.apply(*leaves, mean, var, None, norm)
        assert torch.equal(y, expected)
        grads = [torch.autograd.grad(z, given, g) for z in (y, expected)]
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_compiled_is_eager(training, layout):
    model = torch.nn.Sequential(
        bt.BatchNorm2d(4, momentum=None),
        bt.BatchNormAct2d(4, activation="hardswish"),
        bt.Dropout(0.5).eval(),
        bt.BatchNorm2d(4, track_running_stats=False),
    )
    for norm in (model[0], model[1], model[3]):
        norm.train(training)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = tensor((3, 4, 5, 2), layout=layout)
    for _ in range(2):
        for found, want in zip(passes(compiled, x), passes(model, x), strict=True):
            close(found, want, torch.float32)
    for key, value in model.state_dict().items():
        close(other.state_dict()[key], value, torch.float32)


@pytest.mark.parametrize("module", [bt.Dropout(0.5), bt.Dropout2d(0.5), bt.AlphaDropout(0.5)])
def test_compiled_dropout(module):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, 40, 2, 2, requires_grad=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert 0.4 < (grad == 0).double().mean() < 0.6
    kept = grad != 0
    slope = ((y - y.min()) if isinstance(module, bt.AlphaDropout) else y)[kept]
    assert slope.numel()
    assert torch.equal((grad != 0), kept)
    assert not torch.equal(compiled(x), y)
    torch.manual_seed(4)
    first = compiled(x)
    torch.manual_seed(4)
    assert torch.equal(compiled(x), first)


def test_export_has_pytorchs_operators():
    model, _ = bt.accelerate(network().eval())  # whose forward method is rewritten
    x = torch.randn(3, 2, 6, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "bnext" not in str(program.graph)
    assert "batch_norm" in str(program.graph)
    close(program.module()(x[:2]), model(x[:2]), torch.float32)


def test_who_watches_operators_sees_pytorchs():
    for module in (bt.BatchNorm2d(3), bt.Dropout(0.5)):
        graph = make_fx(module)(torch.randn(2, 3, 4, 4)).graph
        names = {str(node.target) for node in graph.nodes}
        assert names & {"aten.native_batch_norm.default", "aten.bernoulli_.float"}


@jit_warns
def test_jit_trace():
    model = torch.nn.Sequential(bt.BatchNorm2d(3), bt.Dropout()).eval()
    x = torch.randn(2, 3, 4, 4)
    traced = torch.jit.trace(model, x)
    close(traced(x), model(x), torch.float32)


def test_results_do_not_copy_inputs():
    before = _core.copy_count()
    for layout in ("contiguous", "last"):
        x = tensor((3, 4, 5, 6), torch.bfloat16, layout).requires_grad_()
        bt.BatchNorm2d(4)(x).backward(tensor((3, 4, 5, 6), torch.bfloat16, layout))
    assert _core.copy_count() == before
    assert isinstance(_bridge.to_array(x, last=True), np.ndarray)
