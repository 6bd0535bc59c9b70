"""Optimizers against their formulas and PyTorch; schedules against theirs."""

import math

import numpy as np
import pytest

from bnext import nn, schedules
from bnext.nn.module import Parameter
from bnext.optim import SGD, Adam, AdamW, Optimizer
from bnext.schedules import Constant, Cosine, Step

SHAPES = {"weight": (3, 4), "scalar": (), "empty": (0, 2), "bias": (4,)}
SPARED = {"bias"}
STEPS = 20


def sgd(theta, grad, state, t, *, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    grad = grad + weight_decay * theta
    state["b"] = momentum * state.get("b", 0.0) + grad
    return theta - lr * (grad + momentum * state["b"] if nesterov else state["b"])


def adam(theta, grad, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    grad = grad + weight_decay * theta
    state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * grad
    state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * grad**2
    m = state["m"] / (1 - betas[0] ** t)
    v = state["v"] / (1 - betas[1] ** t)
    return theta - lr * m / (np.sqrt(v) + eps)


def adamw(theta, grad, state, t, *, lr=1e-3, weight_decay=0.01, **options):
    return adam(theta * (1 - lr * weight_decay), grad, state, t, lr=lr, **options)


CASES = [
    (SGD, sgd, dict(lr=0.1)),
    (SGD, sgd, dict(lr=0.1, weight_decay=0.05)),
    (SGD, sgd, dict(lr=0.1, momentum=0.9)),
    (SGD, sgd, dict(lr=0.1, momentum=0.8, weight_decay=0.05)),
    (SGD, sgd, dict(lr=0.1, momentum=0.9, nesterov=True)),
    (SGD, sgd, dict(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.05)),
    (Adam, adam, dict()),
    (Adam, adam, dict(lr=0.01, betas=(0.5, 0.7), eps=1e-3)),
    (Adam, adam, dict(lr=0.01, weight_decay=0.1)),
    (Adam, adam, dict(lr=0.01, betas=(0.0, 0.0))),
    (AdamW, adamw, dict()),
    (AdamW, adamw, dict(lr=0.02, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)),
]
cases = pytest.mark.parametrize(
    ("kind", "formula", "options"),
    CASES,
    ids=[f"{kind.__name__}-{'-'.join(options)}" for kind, _, options in CASES],
)


def parameters(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        name: Parameter(np.asarray(rng.normal(size=shape), dtype), decay=name not in SPARED)
        for name, shape in SHAPES.items()
    }


def gradients(t, dtype=np.float64):
    rng = np.random.default_rng(t)
    return {
        name: np.asarray(rng.normal(0.3, 1, size=shape), dtype) for name, shape in SHAPES.items()
    }


def take_steps(optimizer, owned, steps, dtype=np.float64):
    for t in steps:
        optimizer.zero_grad()
        for name, grad in gradients(t, dtype).items():
            owned[name].accumulate(grad)
        optimizer.step()


def assert_same(owned, values, rtol):
    for name, parameter in owned.items():
        assert parameter.data.dtype == values[name].dtype
        assert parameter.data.shape == values[name].shape
        np.testing.assert_allclose(parameter.data, values[name], rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@cases
def test_equals_the_formula(kind, formula, options, dtype):
    owned = parameters(dtype)
    arrays = {name: parameter.data for name, parameter in owned.items()}
    values = {name: parameter.data.astype(np.float64) for name, parameter in owned.items()}
    states = {name: {} for name in owned}
    optimizer = kind(owned.items(), **options)
    for t in range(1, STEPS + 1):
        take_steps(optimizer, owned, [t], dtype)
        for name, grad in gradients(t, dtype).items():
            np.testing.assert_array_equal(owned[name].grad, grad, err_msg="step changed it")
            spared = dict(weight_decay=0.0) if name in SPARED else {}
            values[name] = np.asarray(
                formula(values[name], grad.astype(float), states[name], t, **{**options, **spared})
            )
    assert all(owned[name].data is array for name, array in arrays.items())
    assert_same(owned, {k: v.astype(dtype) for k, v in values.items()}, 20 * np.finfo(dtype).eps)


@cases
def test_agrees_with_pytorch(kind, formula, options):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    owned = parameters()
    tensors = {name: torch.tensor(parameter.data) for name, parameter in owned.items()}
    groups = [
        {"params": [tensor], **(dict(weight_decay=0.0) if name in SPARED else {})}
        for name, tensor in tensors.items()
    ]
    theirs = getattr(torch.optim, kind.__name__)(groups, **options)
    ours = kind(owned.items(), **options)
    for t in range(STEPS):
        take_steps(ours, owned, [t])
        for name, grad in gradients(t).items():
            tensors[name].grad = torch.tensor(grad)
        theirs.step()
    assert_same(owned, {name: tensor.numpy() for name, tensor in tensors.items()}, 1e-13)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_decay_spares_norms_and_biases(kind):
    model = nn.Sequential(
        {"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm(2), "linear": nn.Linear(2, 2)}
    )
    before = {}
    for name, parameter in model.named_parameters():
        parameter.data[...] = 1
        parameter.accumulate(np.zeros_like(parameter.data))
        before[name] = parameter.data.copy()
    kind(model.named_parameters(), lr=0.1, weight_decay=0.5).step()
    changed = {n for n, p in model.named_parameters() if not np.array_equal(p.data, before[n])}
    assert changed == {"conv.weight", "linear.weight"}


@cases
def test_without_gradient_a_parameter_and_its_state_stay(kind, formula, options):
    owned = parameters()
    optimizer = kind(owned.items(), **options)
    take_steps(optimizer, owned, range(3))

    def everything(name):
        state = optimizer.state_dict()
        mine = [value for key, value in state.items() if key.endswith(f".{name}")]
        return [np.copy(value) for value in (owned[name].data, *mine)]

    rest, moved = everything("weight"), everything("bias")
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in owned.values())
    owned["bias"].accumulate(np.ones(4))
    optimizer.step()
    np.testing.assert_equal(everything("weight"), rest)
    assert optimizer.state_dict()["step.bias"] == 4
    assert not np.array_equal(everything("bias")[0], moved[0])


@cases
def test_state_round_trip_continues_bit_for_bit(kind, formula, options):
    straight = parameters(np.float32)
    take_steps(kind(straight.items(), **options), straight, range(10), np.float32)

    first = parameters(np.float32)
    optimizer = kind(first.items(), **options)
    take_steps(optimizer, first, range(6), np.float32)
    state = {key: np.copy(value) for key, value in optimizer.state_dict().items()}

    second = {name: Parameter(p.data.copy(), decay=p.decay) for name, p in first.items()}
    resumed = kind(second.items(), **{**options, "lr": 7.0})
    resumed.load_state_dict(state)
    take_steps(resumed, second, range(6, 10), np.float32)
    for name in SHAPES:
        np.testing.assert_array_equal(second[name].data, straight[name].data)
    assert resumed.state_dict()["step.weight"] == 10


def test_load_copies():
    owned = parameters()
    optimizer = Adam(owned.items())
    state = {key: np.copy(value) for key, value in optimizer.state_dict().items()}
    state["lr"] = 0.5
    optimizer.load_state_dict(state)
    take_steps(optimizer, owned, [0])
    assert (state["exp_avg.weight"] == 0).all()
    assert optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg.weight": None}, r"missing key 'exp_avg\.weight'"),
        ({"lr": None}, "missing key 'lr'"),
        ({"exp_avg.other": np.ones(3)}, r"unexpected key 'exp_avg\.other'"),
        (
            {"exp_avg_sq.weight": np.ones((4, 3))},
            r"'exp_avg_sq\.weight': expected shape \(3, 4\), got \(4, 3\)",
        ),
        ({"step.bias": np.ones(1)}, r"'step\.bias': expected shape \(\), got \(1,\)"),
        ({"step.bias": -1}, r"'step\.bias': expected 0 or more, got -1"),
        ({"lr": -0.1}, r"lr: expected a finite number >= 0, got -0\.1"),
        ({"lr": math.nan}, "lr: expected a finite number >= 0, got nan"),
        ({"exp_avg.scalar": np.array("a")}, "'exp_avg.scalar': expected dtype float.*, got <U1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    owned = parameters()
    optimizer = Adam(owned.items())
    take_steps(optimizer, owned, range(3))
    before = {key: np.copy(value) for key, value in optimizer.state_dict().items()}
    state = {key: np.zeros_like(value) for key, value in before.items()} | {"lr": 0.7} | change
    with pytest.raises(ValueError, match=f"^Adam.*{message}"):
        optimizer.load_state_dict({k: v for k, v in state.items() if v is not None})
    np.testing.assert_equal(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(kind=SGD, lr=0.1), dict(kind=SGD, lr=0.1, momentum=0.9)),
        (dict(kind=SGD, lr=0.1, momentum=0.9), dict(kind=Adam)),
        (dict(kind=Adam), dict(kind=SGD, lr=0.1)),
    ],
)
def test_the_state_of_another_optimizer_is_refused(one, other):
    def build(kind, **options):
        return kind(parameters().items(), **options)

    with pytest.raises(ValueError, match=r"load_state_dict: .*(missing|unexpected) key"):
        build(**other).load_state_dict(build(**one).state_dict())


def test_parameters_without_names_are_numbered():
    optimizer = SGD(parameters().values(), lr=0.1, momentum=0.9)
    assert set(optimizer.state_dict()) == {
        "lr",
        *(f"{kind}.{i}" for kind in ("step", "momentum") for i in range(len(SHAPES))),
    }


def test_lr_may_be_set_at_any_time():
    weight = Parameter(np.zeros(1))
    optimizer = SGD([weight], lr=1)
    for lr in (0.5, 0.0, np.float32(0.25)):
        optimizer.lr = lr
        weight.grad = np.ones(1)
        optimizer.step()
    assert weight.data == -0.75
    with pytest.raises(ValueError, match=r"SGD: lr: expected .*, got -1"):
        optimizer.lr = -1
    assert optimizer.lr == 0.25


def test_a_gradient_of_another_shape_is_refused():
    weight = Parameter(np.zeros((2, 3)))
    weight.grad = np.ones(3)
    with pytest.raises(ValueError, match=r"SGD: 0\.grad: expected shape \(2, 3\), got \(3,\)"):
        SGD([weight], lr=1).step()
    np.testing.assert_array_equal(weight.data, 0)


def test_parameters_of_several_dtypes():
    one, two = Parameter(np.ones(3, np.float32)), Parameter(np.ones(2, np.float64))
    optimizer = Adam([one, two], lr=0.1, weight_decay=0.1)
    for parameter in (one, two):
        parameter.accumulate(np.ones(parameter.data.shape))
    optimizer.step()
    np.testing.assert_allclose(one.data, 0.9, rtol=1e-6)
    np.testing.assert_allclose(two.data, 0.9, rtol=1e-7)
    assert one.data.dtype == np.float32


W = Parameter(np.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SGD([], 0.1), ValueError, "SGD: parameters: expected at least one, got none"),
        (lambda: SGD([W, W], 0.1), ValueError, "SGD: parameters: '1' appears twice"),
        (lambda: Adam([("a", W), ("a", Parameter(np.ones(1)))]), ValueError, "'a' appears twice"),
        (lambda: Adam([np.ones(2)]), TypeError, "Adam: parameters: expected .*, got ndarray"),
        (lambda: Adam([("a", 1.0)]), TypeError, "Adam: parameters: expected .*, got float"),
        (lambda: SGD(nn.ReLU(), 0.1), TypeError, "SGD: parameters: .* iterable, .*, got ReLU"),
        (
            lambda: SGD([W], 1).load_state_dict([1]),
            TypeError,
            "SGD.load_state_dict: state: .* list",
        ),
        (lambda: SGD([W], -0.1), ValueError, r"SGD: lr: expected .* >= 0, got -0\.1"),
        (lambda: SGD([W], math.inf), ValueError, "SGD: lr: expected a finite number.*, got inf"),
        (lambda: SGD([W], math.nan), ValueError, "SGD: lr: expected a finite number.*, got nan"),
        (lambda: SGD([W], "0.1"), TypeError, "SGD: lr: expected a number, got str"),
        (lambda: SGD([W], None), TypeError, "SGD: lr: expected a number, got NoneType"),
        (lambda: SGD([W], 1, momentum=1), ValueError, r"momentum: expected .* \[0, 1\), got 1"),
        (lambda: SGD([W], 1, momentum=-1), ValueError, "SGD: momentum: expected .*, got -1"),
        (lambda: SGD([W], 1, nesterov=True), ValueError, "SGD: nesterov: expected a momentum > 0"),
        (lambda: SGD([W], 1, weight_decay=-1), ValueError, "weight_decay: expected .*, got -1"),
        (lambda: AdamW([W], weight_decay=math.nan), ValueError, "AdamW: weight_decay: .*, got nan"),
        (lambda: Adam([W], betas=(0.9, 1)), ValueError, r"betas: expected .* \[0, 1\), got 1"),
        (lambda: Adam([W], betas=(-0.1, 0.9)), ValueError, r"Adam: betas: expected .*, got -0\.1"),
        (lambda: Adam([W], betas=0.9), ValueError, r"betas: expected two numbers, got 0\.9"),
        (lambda: Adam([W], betas=(0.9,)), ValueError, r"betas: expected two numbers, got \(0\.9,"),
        (lambda: Adam([W], betas=("a", "b")), TypeError, "betas: expected a number, got str"),
        (lambda: Adam([W], eps=-1e-8), ValueError, "Adam: eps: expected .* >= 0, got -1e-08"),
        (lambda: Optimizer([W], 0.1, weight_decay=0).load_state_dict({}), ValueError, "missing"),
        (lambda: Constant(0), ValueError, "Constant: lr: expected a finite number > 0, got 0"),
        (lambda: Constant(-1), ValueError, "Constant: lr: expected .*, got -1"),
        (lambda: Constant(math.inf), ValueError, "Constant: lr: expected .*, got inf"),
        (lambda: Constant(math.nan), ValueError, "Constant: lr: expected .*, got nan"),
        (lambda: Constant(1, warmup=-1), ValueError, "warmup: expected .* steps >= 0, got -1"),
        (lambda: Constant(1, warmup=1.5), ValueError, r"warmup: expected a whole .*, got 1\.5"),
        (lambda: Constant(1, warmup=math.nan), ValueError, "warmup: expected .*, got nan"),
        (lambda: Constant(1, warmup=math.inf), ValueError, "warmup: expected .*, got inf"),
        (lambda: Constant("a"), TypeError, "Constant: lr: expected a number, got str"),
        (lambda: Constant(1, warmup="3"), TypeError, "warmup: expected a number, got str"),
        (lambda: Step(1, every="3"), TypeError, "Step: every: expected a number, got str"),
        (lambda: Cosine(1, total="5"), TypeError, "Cosine: total: expected a number, got str"),
        (lambda: Step(1, every=0), ValueError, "Step: every: expected .* steps >= 1, got 0"),
        (lambda: Step(1, every=2.5), ValueError, r"every: expected a whole .*, got 2\.5"),
        (lambda: Step(1, every=math.inf), ValueError, "every: expected .*, got inf"),
        (lambda: Step(1, every=1, gamma=0), ValueError, r"gamma: expected .* \(0, 1\], got 0"),
        (lambda: Step(1, every=1, gamma=1.1), ValueError, r"Step: gamma: expected .*, got 1\.1"),
        (lambda: Cosine(1, total=0), ValueError, "Cosine: total: expected more .*'s 0, got 0"),
        (lambda: Cosine(1, total=3, warmup=3), ValueError, "total: expected more .*'s 3, got 3"),
        (lambda: Cosine(1, total=1.5), ValueError, r"Cosine: total: expected .*, got 1\.5"),
        (lambda: Cosine(1, total=math.inf), ValueError, "Cosine: total: expected .*, got inf"),
        (lambda: Cosine(1, total=3, final=-1), ValueError, r"final: .* in \[0, 1\], got -1"),
        (lambda: Cosine(1, total=3, final=2), ValueError, "Cosine: final: .*, got 2"),
        (lambda: build(name="cos"), ValueError, "name: expected one of constant, .*, got 'cos'"),
        (lambda: build(lr=0), ValueError, "lr: expected a finite number > 0, got 0"),
        (lambda: build(epochs=0), ValueError, "schedules.build: epochs: expected 1 .*, got 0"),
        (lambda: build(epochs="3"), TypeError, "schedules.build: epochs: .* integer, got '3'"),
        (lambda: build(epochs=1.5), TypeError, r"build: epochs: expected an integer, got 1\.5"),
        (lambda: build(warmup_epochs="1"), TypeError, "build: warmup_epochs: expected a number"),
        (lambda: build(steps_per_epoch=0), ValueError, "steps_per_epoch: expected 1 .*, got 0"),
        (lambda: build(warmup_epochs=-1), ValueError, "build: warmup_epochs: expected .*, got -1"),
        (lambda: build(warmup_epochs=3), ValueError, r"from 0 to below 3 \(the epochs\), got 3"),
        (lambda: build(warmup_epochs=math.nan), ValueError, "warmup_epochs: .*, got nan"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message) as info:
        call()
    assert type(info.value) is error


# Schedules


def build(**changes):
    return schedules.build(**{**dict(name="cosine", lr=1, epochs=3, steps_per_epoch=4), **changes})


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Constant(0.5), [0.5] * 5),
        (Constant(1, warmup=3), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Step(1, every=2, gamma=0.5), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        (Step(2, every=1, warmup=1), [1, 2, 0.2, 0.02]),
        (Step(1, every=1, gamma=1), [1, 1, 1]),
        (Cosine(2, total=4), [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0, 0]),
        (Cosine(1, total=4, warmup=2), [1 / 3, 2 / 3, 1, 0.5, 0, 0]),
        (Cosine(1, total=2, final=0.2), [1, 0.6, 0.2, 0.2]),
    ],
)
def test_rates(schedule, rates):
    steps = range(len(rates))
    np.testing.assert_allclose([schedule(step) for step in steps], rates, rtol=1e-14, atol=1e-15)
    # A pure function of the step: no order of calls makes a difference.
    assert [schedule(step) for step in reversed(steps)] == [schedule(step) for step in steps][::-1]


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 2, 2.99])
@pytest.mark.parametrize("name", schedules.names())
def test_built_schedules_rise_and_then_fall(name, warmup_epochs):
    steps = 3 * 40
    schedule = build(name=name, lr=0.3, steps_per_epoch=40, warmup_epochs=warmup_epochs)
    rates = np.array([schedule(step) for step in range(steps + 1)])
    top = min(round(40 * warmup_epochs), steps - 1)
    assert rates[top] == 0.3
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    assert (rates[:-1] > 0).all()
    if name == "cosine":
        assert rates[-1] == schedule(10**9) == 0
        assert (np.diff(rates[top:]) < 0).all()
    if name == "constant":
        assert rates[-1] == 0.3


def test_built_steps_drop_after_each_third():
    schedule = build(name="step", epochs=9, steps_per_epoch=10, warmup_epochs=3)
    rates = [schedule(step) for step in (29, 30, 49, 50, 69, 70, 89)]
    np.testing.assert_allclose(rates, [30 / 31, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_shortest_training():
    for name in schedules.names():
        assert build(name=name, epochs=1, steps_per_epoch=1, warmup_epochs=0.9)(0) == 1


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_agrees_with_pytorch(final):
    torch = pytest.importorskip("torch", reason="PyTorch is the peer; pip install bnext[peers]")
    ours = Cosine(0.4, total=30, final=final)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0.4 * final)
    for step in range(31):
        np.testing.assert_allclose(ours(step), theirs.get_last_lr()[0], rtol=1e-12, atol=1e-16)
        optimizer.step()
        theirs.step()
