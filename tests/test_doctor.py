"""`bnext.doctor`: every rule on a planted fault and on its healthy twin, for both frameworks."""

import copy
import doctest
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import bnext
from bnext import cli, data, diagnosis, models, nn, random
from bnext.diagnosis import RULES, _doctor, _measured, rules
from bnext.diagnosis._network import network_of
from bnext.nn.batchnorm import batch_norms

DOCS = pathlib.Path(__file__).parents[1] / "docs"
CLASSES = 4


# -- the same networks in both frameworks ----------------------------------------------
def conv(inputs, outputs, bias=False):
    return ("conv", inputs, outputs, bias)


def linear(inputs, outputs, bias=False):
    return ("linear", inputs, outputs, bias)


HEALTHY = [
    *(conv(3, 16), ("norm", 16), ("relu",)),
    *(conv(16, 16), ("norm", 16), ("relu",)),
    *(("mean",), ("dropout", 0.2), linear(16, CLASSES, True)),
]
MLP = [("flatten",), linear(192, 32), ("norm", 32), ("relu",), linear(32, CLASSES, True)]


def ours(layers):
    kinds = {
        "conv": lambda i, o, bias: nn.Conv2d(i, o, 3, padding=1, bias=bias),
        "linear": nn.Linear,
        "norm": nn.BatchNorm,
        "relu": nn.ReLU,
        "mean": nn.GlobalAvgPool2d,
        "flatten": nn.Flatten,
        "dropout": nn.Dropout,
        "dropout2d": nn.Dropout2d,
    }
    bnext.manual_seed(0)
    return nn.Sequential(*(kinds[kind](*rest) for kind, *rest in layers))


def theirs(layers):
    torch = pytest.importorskip("torch", reason="the network is PyTorch's")

    def norm(features):
        image = any(kind == "conv" for kind, *_ in layers)
        return (torch.nn.BatchNorm2d if image else torch.nn.BatchNorm1d)(features)

    kinds = {
        "conv": lambda i, o, bias: [torch.nn.Conv2d(i, o, 3, padding=1, bias=bias)],
        "linear": lambda i, o, bias: [torch.nn.Linear(i, o, bias)],
        "norm": lambda features: [norm(features)],
        "relu": lambda: [torch.nn.ReLU()],
        "mean": lambda: [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()],
        "flatten": lambda: [torch.nn.Flatten()],
        "dropout": lambda p: [torch.nn.Dropout(p)],
        "dropout2d": lambda p: [torch.nn.Dropout2d(p)],
    }
    torch.manual_seed(0)
    return torch.nn.Sequential(*(one for kind, *rest in layers for one in kinds[kind](*rest)))


FRAMEWORKS = {"bnext": ours, "torch": theirs}


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The arrays are small: threads would only wait for each other."""
    bnext.set_num_threads(1)


@pytest.fixture(params=FRAMEWORKS)
def build(request):
    return FRAMEWORKS[request.param]


def norms(model):
    return [module for module in model.modules() if hasattr(module, "running_var")]


def weights(model):
    """Layers before BatchNorm."""
    kinds = ("Conv2d", "Linear")
    return [module for module in model.modules() if type(module).__name__ in kinds][:-1]


def state(model):
    arrays = {name: np.asarray(array) for name, array in model.state_dict().items()}
    return {name: array.copy() for name, array in arrays.items()}


def images(n=512, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    x = rng.normal(size=(n, 3, 8, 8)) + 0.3 * y[:, np.newaxis, np.newaxis, np.newaxis]
    return x.astype(np.float32), y


def outputs(model, x):
    network = network_of(model)
    with network.preserved():
        return network.array(network.run(network.convert(x), "running"))


def put(target, values):
    """Write a NumPy array into an array or a tensor."""
    target[...] = values if isinstance(target, np.ndarray) else type(target)(values)


def settled(model, x):
    """`model` with the running statistics of x, as training leaves them, and sure of itself."""
    network = network_of(model)
    items = [(network.convert(x[start : start + 64]), None) for start in range(0, len(x), 64)]
    with network.preserved():
        channels, _ = _measured.passed(network, items, "batch")
    for name, layer in model.named_modules():
        if name in channels:
            layer.num_batches_tracked += 1
            put(layer.running_mean, channels[name].mean)
            put(layer.running_var, channels[name].var)
    *_, head = model.modules()
    put(head.bias.data, np.asarray(head.bias.data) - outputs(model, x).mean(0))
    head.weight.data *= 30
    head.bias.data *= 30
    return model


class Case:
    """What is wrong, and how the doctor is called."""

    def __init__(self, layers=None, twin=None, plant=None, change=None, **options):
        self.layers = layers or HEALTHY
        self.twin = twin or HEALTHY
        self.plant = plant or (lambda model: None)
        self.change = change or (lambda x, y: (x, y))
        self.options = options
        self.twin_options = options.pop("twin_options", {})


def scale(factor, what):
    def plant(model):
        for layer in norms(model):
            getattr(layer, what)[...] *= factor

    return plant


def kill(model):
    for layer in norms(model):
        layer.bias.data[::4] = -20


def switch_off(model):
    norms(model)[0].weight.data[::2] = 0


def empty(model):
    weights(model)[0].weight.data[0] = 0


def poison(model):
    norms(model)[0].running_var[1] = np.nan


def forgetful(model):
    norms(model)[0].momentum = 0.999


def stuck(model):
    norms(model)[0].momentum = 0


def grow(model):
    for layer in weights(model):
        layer.weight.data *= 5


def by_class(x, y):
    order = np.argsort(y, kind="stable")
    return 3 * x[order] + 3 * y[order][:, np.newaxis, np.newaxis, np.newaxis], y[order]


def outliers(x, y):
    x = x.copy()
    x[::64] *= 200
    return x, y


def at(index, layer, layers=HEALTHY):
    return [*layers[:index], layer, *layers[index:]]


SMALL = {"twin": MLP, "layers": MLP, "twin_options": {"batch_size": 64}}
BEFORE_NORM = at(4, ("dropout", 0.5))
CASES = {
    "BNX101": [
        Case(**SMALL, batch_size=1),
        Case(
            **SMALL | {"twin_options": {"dataset_size": 640}}, dataset_size=641, last_batch="keep"
        ),
    ],
    "BNX102": [Case(**SMALL, batch_size=12)],
    "BNX103": [
        Case(
            **SMALL | {"twin_options": {"last_batch": "drop"}}, dataset_size=643, last_batch="keep"
        )
    ],
    "BNX104": [
        Case([conv(3, 16, True), *HEALTHY[1:]]),
        Case([MLP[0], linear(192, 32, True), *MLP[2:]], MLP),
    ],
    "BNX105": [Case(BEFORE_NORM), Case(at(4, ("dropout2d", 0.3)))],
    "BNX106": [Case(at(3, ("dropout", 0.5))), Case(at(0, ("dropout", 0.5), MLP), MLP)],
    "BNX107": [Case(plant=forgetful), Case(plant=stuck)],
    "BNX108": [Case(batch_size=4, twin_options={"batch_size": 64})],
    "BNX201": [Case(plant=scale(4, "running_var"))],
    "BNX202": [Case(**SMALL, batch_size=8)],
    "BNX203": [Case(plant=empty)],
    "BNX204": [Case(plant=kill)],
    "BNX205": [Case(BEFORE_NORM), Case(at(3, ("dropout2d", 0.5)))],
    "BNX206": [Case(plant=scale(0.1, "running_var"))],
    "BNX207": [Case(change=by_class, shuffle=False, twin_options={"shuffle": True})],
    "BNX208": [Case(plant=switch_off)],
    "BNX209": [Case(change=outliers)],
    "BNX210": [Case(plant=grow)],
    "BNX211": [Case(twin_options={"learned": True}, learned=False)],
    "BNX212": [Case(plant=poison)],
}
PARAMETERS = [(code, number) for code, cases in CASES.items() for number in range(len(cases))]


def examined(build, case, twin=False):
    """The doctor's report on a case, or on the same without the fault."""
    x, y = images()
    options = {**case.options, **(case.twin_options if twin else {})}
    if not twin or case.twin_options:
        x, y = case.change(x, y)
    model = build(case.twin if twin else case.layers)
    initial = state(model)
    if not twin and case.plant is grow:
        grow(model)
    settled(model, x)
    if options.pop("learned", True):  # what it says is right
        y = outputs(model, x).argmax(1)
    if not twin and case.plant is not grow:
        case.plant(model)
    half = len(x) // 2
    return bnext.doctor(
        model,
        (x, y),
        validation=(x[:half], y[:half]),
        initial={**initial} if case.plant is grow or twin else None,
        **options,
    )


def test_every_rule_has_a_case():
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize(("code", "number"), PARAMETERS)
def test_rule_finds_a_fault_and_not_its_twin(build, code, number):
    case = CASES[code][number]
    report = examined(build, case)
    assert code in report.codes, str(report)
    assert code not in examined(build, case, twin=True).codes
    for finding in report.findings:
        assert finding.severity == finding.rule.severity(finding.figure)


@pytest.mark.parametrize("layers", [HEALTHY, MLP])
def test_healthy_networks_have_no_finding(build, layers):
    report = examined(build, Case(layers, layers), twin=True)
    assert report.ok, str(report)
    dropout = any(kind == "dropout" for kind, *_ in layers)
    assert dict(report.skipped) == (
        {} if dropout else dict.fromkeys(["BNX205", "BNX211"], "no dropout")
    )
    assert "No findings." in str(report)


# -- what it leaves behind -------------------------------------------------------------
def everything(model):
    network = network_of(model)
    found = {name: array.tobytes() for name, array in network.state().items()}
    found["modes"] = [module.training for module in model.modules()]
    found["attributes"] = [sorted(module.__dict__) for module in model.modules()]
    found["updates"] = [getattr(module, "track_running_stats", None) for module in model.modules()]
    found["dropout"] = random.default_generator.state
    found["initial"] = random.initial_rng().bit_generator.state
    found["numpy"] = np.random.get_state()[1].tobytes()  # noqa: NPY002
    if network.framework == "torch":
        import torch

        found["torch"] = torch.get_rng_state().numpy().tobytes()
        found["hooks"] = [
            (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        found["grad"] = torch.is_grad_enabled()
    return found


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(build, training):
    x, y = images(256)
    model = settled(build(at(4, ("dropout", 0.3))), x)
    model.train(training)
    norms(model)[1].training = not training  # a mode of its own
    before = everything(model)
    bnext.doctor(model, (x, y), validation=(x, y), initial=state(model))
    assert everything(model) == before

    calls = []

    def broken(output, y):
        calls.append(1)
        if len(calls) > 5:  # somewhere in the second pass
            raise OSError("gone")
        return np.zeros(len(y))

    with pytest.raises(OSError, match="gone"):
        bnext.doctor(model, (x, y), loss=broken)
    assert everything(model) == before


def test_generators_of_layers_come_back():
    x, y = images(128)
    generator = bnext.Generator(7)
    model = ours(HEALTHY)
    model[7].generator = generator
    before = generator.state
    bnext.doctor(model, (x, y))
    assert generator.state == before


def test_the_same_seed_gives_the_same_report(build):
    x, y = images(256)
    model = settled(build(BEFORE_NORM), x)
    reports = [bnext.doctor(model, (x, y), seed=3).to_json() for _ in range(2)]
    assert reports[0] == reports[1]


# -- figures against independent references --------------------------------------------
def collected(x, batch):
    channels = _measured.Channels()
    for start in range(0, len(x), batch):
        channels.add(x[start : start + batch], x[start : start + batch])
    return channels


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("shape", [(240, 3, 1), (240, 3, 7), (37, 1, 4)])
def test_moments(shape, offset):
    stats = pytest.importorskip("scipy.stats", reason="the reference")
    x = np.random.default_rng(0).gamma(2, size=shape) + offset
    channels = collected(x, 16)
    flat = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
    np.testing.assert_allclose(channels.mean, flat.mean(1), rtol=1e-12)
    np.testing.assert_allclose(channels.var, flat.var(1), rtol=1e-9)
    np.testing.assert_allclose(channels.kurtosis, stats.kurtosis(flat, axis=1), rtol=1e-6)
    np.testing.assert_allclose(channels.positive, (flat > 0).mean(1))
    means = x.mean(2)
    groups = [means[start : start + 16] for start in range(0, len(x), 16)]
    expected = [stats.f_oneway(*(g[:, c] for g in groups)).statistic for c in range(shape[1])]
    np.testing.assert_allclose(channels.imbalance, expected, rtol=1e-5)


@pytest.mark.parametrize("correlated", [False, True])
def test_standard_error_of_the_variance_is_what_batches_show(correlated):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 2, 9))
    if correlated:
        x = 0.8 * rng.normal(size=(20_000, 2, 1)) + 0.6 * x
    channels = collected(x, 1000)
    batches = x.reshape(-1, 32, 2, 9).var((1, 3))
    seen = batches.std(0) / x.var((0, 2))
    np.testing.assert_allclose(channels.rse(32), seen, rtol=0.1)
    np.testing.assert_allclose(channels.correlation, 0.64 if correlated else 0, atol=0.02)


@pytest.mark.parametrize(
    "layers",
    [
        BEFORE_NORM,
        at(4, ("dropout2d", 0.3)),
        at(3, ("dropout", 0.5)),
        at(0, ("dropout", 0.5), MLP),
        [MLP[0], ("dropout", 0.4), ("relu",), *MLP[1:]],
    ],
)
def test_predicted_shift_is_the_measured_one(build, layers):
    x, y = images(2048)
    model = settled(build(layers), x)
    report = bnext.doctor(model, (x, y), select=["BNX105", "BNX106"])
    (finding,) = report.findings
    (row,) = [row for row in report.layers if row.layer == finding.layer]
    assert finding.figure == pytest.approx(row.shift, rel=0.05)


def test_gap_is_measured_in_sigma_and_ratios():
    x, y = images()
    model = settled(ours(HEALTHY), x)
    layer = norms(model)[0]
    sigma = np.sqrt(layer.running_var + layer.eps)
    layer.running_mean += 0.5 * sigma
    report = bnext.doctor(model, (x, y))
    assert report.layers[0].gap == pytest.approx(0.5 / rules.GAP_OF_MEAN, rel=0.02)
    layer.running_mean -= 0.5 * sigma
    layer.running_var *= 2
    report = bnext.doctor(model, (x, y))
    assert report.layers[0].gap == pytest.approx(np.log(2) / np.log(rules.GAP_OF_VAR), rel=0.02)


def test_losses_are_those_of_evaluate_and_reestimate():
    from bnext.train import evaluate

    x, y = images(512)
    model = settled(ours(HEALTHY), x)
    norms(model)[1].running_var *= 3
    report = bnext.doctor(model, (x, y), validation=(x[:100], y[:100]))
    seen = {(e.data, e.statistics): e for e in report.evaluations}
    assert list(seen) == [
        (data, statistics)
        for data in ("training", "validation")
        for statistics in ("batch", "running", "re-estimated")
    ]
    for key, part in ((("training", "running"), 512), (("validation", "running"), 100)):
        expected = evaluate(model, x[:part], y[:part])
        assert seen[key].loss == pytest.approx(expected.loss, rel=1e-5)
        assert seen[key].accuracy == pytest.approx(expected.accuracy)
        assert seen[key].samples == part
    order = np.random.default_rng(0).permutation(512)
    bnext.reestimate(model, [x[order[start : start + 64]] for start in range(0, 512, 64)])
    expected = evaluate(model, x, y)
    assert seen["training", "re-estimated"].loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_loss_of_ones_own():
    torch = pytest.importorskip("torch", reason="its loss is used")
    x, y = images(256)
    options = {"select": ["BNX206"], "validation": (x[:64], y[:64])}
    model = settled(theirs(HEALTHY), x)
    plain = bnext.doctor(model, (x, y), **options)

    def loss(output, y):
        return torch.nn.functional.cross_entropy(output, y, reduction="none")

    own = bnext.doctor(model, (torch.from_numpy(x), torch.from_numpy(y)), loss=loss, **options)
    for a, b in zip(own.evaluations, plain.evaluations, strict=True):
        assert a[:3] == b[:3]
        assert a[3:] == pytest.approx(b[3:], rel=1e-4)


# -- how networks are seen -------------------------------------------------------------
def test_fused_layers_are_seen_as_what_they_do():
    bnext.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm(16, activation="relu", dropout=0.5),
        nn.Residual(body, norm=nn.BatchNorm(16, activation="relu")),
        nn.GlobalAvgPool2d(),
        nn.Linear(16, CLASSES),
    )
    x, y = images(256)
    report = bnext.doctor(model, (x, y))
    assert [(f.code, f.layer) for f in report.findings if f.code < "BNX2"] == [("BNX106", "2.norm")]
    assert all(row.dead == 0 for row in report.layers)
    model[1].bias.data[:8] = -20
    report = bnext.doctor(model, (x, y))
    assert ("BNX204", "1") in [(f.code, f.layer) for f in report.findings]


def test_channels_last_and_masks():
    x, y = images(256)
    model = nn.Sequential(
        nn.BatchNorm(3, channel_axis=-1),
        nn.BatchNorm(3, channel_axis=-1, channel_mask=[True, False, True]),
        nn.Flatten(),
        nn.Linear(192, CLASSES),
    )
    report = bnext.doctor(model, (np.moveaxis(x, 1, -1), y))
    assert [(row.channels, row.values) for row in report.layers] == [(3, 64 * 64)] * 2


def test_ghost_batches_are_what_counts():
    model = nn.Sequential(nn.Linear(8, 16, False), nn.BatchNorm(16, ghost_batch_size=4))
    x = np.random.default_rng(0).normal(size=(640, 8)).astype(np.float32)
    report = bnext.doctor(model, x, batch_size=64)
    assert report.codes == ["BNX102", "BNX202"]
    assert report.layers[0].values == 4


def test_frozen_statistics_are_no_batch_statistics(build):
    x, y = images(256)
    model = build([("flatten",), linear(192, 16, True), ("norm", 16), linear(16, CLASSES)])
    if hasattr(model[2], "freeze"):
        model[2].freeze()
    else:
        model.train()
        model[2].eval()
    assert bnext.doctor(model, (x, y), batch_size=1, validation=(x, y)).findings == []
    assert bnext.doctor(model, (x, y)).codes == []


def test_functions_of_torch_are_seen():
    torch = pytest.importorskip("torch", reason="the network is PyTorch's")
    F = torch.nn.functional

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 16, 3, bias=False)
            self.norm = torch.nn.BatchNorm2d(16)
            self.second = torch.nn.Conv2d(16, 16, 3, bias=False)
            self.last = torch.nn.BatchNorm2d(16)

        def forward(self, x):
            x = F.dropout(F.relu(self.norm(self.first(x))), 0.5, self.training)
            return torch.relu(self.last(self.second(x))).mean((2, 3))

    torch.manual_seed(0)
    net = Net()
    x, _ = images(256)
    torch.optim.swa_utils.update_bn([torch.from_numpy(x)], net)
    net.norm.bias.data[:8] = -20
    report = bnext.doctor(net, x)
    found = {(finding.code, finding.layer) for finding in report.findings}
    assert {("BNX106", "last"), ("BNX204", "norm"), ("BNX205", "last")} <= found
    (finding,) = [finding for finding in report.findings if finding.code == "BNX106"]
    assert finding.figure == pytest.approx(report.layers[1].shift, rel=0.05)


def test_modules_of_bnext_torch_give_the_same_report():
    torch = pytest.importorskip("torch", reason="the network is PyTorch's")
    import bnext.torch

    x, y = images(256)
    model = settled(theirs(BEFORE_NORM), x)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=60
    )
    plain = bnext.doctor(model, loader)
    assert (plain.batch_size, plain.samples) == (60, 256)
    fast, report = bnext.torch.accelerate(copy.deepcopy(model))
    assert report.fused
    before = everything(fast)
    ours = bnext.doctor(fast, loader)
    assert everything(fast) == before
    assert ours.codes == plain.codes
    for a, b in zip(ours.layers, plain.layers, strict=True):
        # Dropout draws other numbers.
        np.testing.assert_allclose(a[3:8], b[3:8], rtol=1e-3, atol=1e-4)


def test_a_bias_that_a_reshape_spreads_over_channels_counts():
    torch = pytest.importorskip("torch", reason="the networks are PyTorch's")
    T = torch.nn

    def codes(shape, *layers):
        return bnext.doctor(T.Sequential(*layers), input_shape=shape).codes

    assert codes((8,), T.Linear(8, 64), T.Unflatten(1, (4, 4, 4)), T.BatchNorm2d(4)) == []
    assert codes((8,), T.Linear(8, 4), T.Unflatten(1, (4, 1, 1)), T.BatchNorm2d(4)) == ["BNX104"]
    for features in (16, 5):  # BatchNorm normalizes the 5 rows, the bias is of columns
        assert codes((5, 8), T.Linear(8, features), T.BatchNorm1d(5)) == []
    assert codes((3, 8), T.Conv1d(3, 6, 3), T.Flatten(2), T.BatchNorm1d(6)) == ["BNX104"]
    assert codes((3, 8), T.Conv1d(3, 6, 3), T.Flatten(), T.BatchNorm1d(36)) == []


def test_a_bias_of_the_last_axis_is_without_effect_channels_last():
    for axis, expected in ((-1, ["BNX104"]), (1, [])):
        model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm(5, channel_axis=axis))
        assert bnext.doctor(model, input_shape=(5, 8)).codes == expected


def test_no_prediction_through_an_activation_before_the_norm(build):
    def codes(*between):
        model = build([("dropout", 0.5), linear(8, 32), *between, ("norm", 32)])
        return bnext.doctor(model, input_shape=(8,)).codes

    assert codes() == ["BNX106"]
    assert codes(("relu",)) == []


def test_accuracy_needs_labels_that_are_classes(build):
    x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    model = build([linear(8, 16), ("norm", 16), ("dropout", 0.5), linear(16, 1, True)])
    settled(model, x)
    y = x[:, 0]
    report = bnext.doctor(model, (x, y), validation=(x, y), loss=lambda o, y: (o[:, 0] - y) ** 2)
    assert np.isnan([row.accuracy for row in report.evaluations]).all()
    assert report.skipped["BNX211"] == "needs integer labels and outputs (N, K)"
    assert "BNX211" not in report.codes


def test_keyword_arguments_of_layers():
    torch = pytest.importorskip("torch", reason="the network is PyTorch's")

    class Net(torch.nn.Module):
        def __init__(self, keywords):
            super().__init__()
            torch.manual_seed(0)
            self.keywords = keywords
            self.first = torch.nn.Linear(8, 16)
            self.norm = torch.nn.BatchNorm1d(16)

        def forward(self, x):
            if self.keywords:
                return self.norm(input=self.first(input=x))
            return self.norm(self.first(x))

    x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    reports = [bnext.doctor(Net(keywords), x) for keywords in (False, True)]
    assert reports[0].codes == reports[1].codes == ["BNX104"]
    assert list(reports[0].layers) == list(reports[1].layers)


def test_batches_of_one_without_running_statistics(build):
    x, y = images(65)
    model = build(MLP)
    norm = type(model[2])(32, track_running_stats=False)
    model = type(model)(model[0], model[1], norm, model[3], model[4])
    for loss in (None, lambda output, y: output.sum(1)):
        report = bnext.doctor(model, (x, y), batch_size=1, validation=(x, y), loss=loss)
        assert report.codes == ["BNX101"]
    report = bnext.doctor(model, (x, y), validation=(x, y))  # a last batch of one
    assert len(report.evaluations) == 4


def test_no_findings_from_nan(build):
    x, y = images(256)
    model = settled(build(HEALTHY), x)
    norms(model)[0].weight.data[...] = np.nan
    report = bnext.doctor(model, (x, y), validation=(x, y))
    assert report.codes == ["BNX212"]
    assert report.skipped["BNX211"] == "losses that are NaN"


def test_frozen_layers_have_no_momentum_and_keep_scales(build):
    x, y = images(256)
    model = build([("flatten",), linear(192, 16), ("norm", 16), linear(16, CLASSES)])
    initial = state(model)
    weights(model)[0].weight.data *= 5
    norms(model)[0].momentum = 0
    assert {"BNX107", "BNX210"} <= set(bnext.doctor(model, (x, y), initial=initial).codes)
    if hasattr(model[2], "freeze"):
        model[2].freeze()
    else:
        model[2].eval()
    assert bnext.doctor(model, (x, y), initial=initial).codes == []


# -- data of all kinds -----------------------------------------------------------------
def test_data_may_come_in_many_ways():
    x, y = images(320)
    model = settled(ours(HEALTHY), x)
    batches = [(x[start : start + 64], y[start : start + 64]) for start in range(0, 320, 64)]
    dataset = data.Dataset("here", x, y, x[:64], y[:64], CLASSES)
    for given, labelled in (
        ((x, y), True),
        ((x, list(y)), True),
        (dataset, True),
        (batches, True),
        (iter(batches), True),
        ([list(batch) for batch in batches], True),
        (x, False),
        ([batch[0] for batch in batches], False),
    ):
        report = bnext.doctor(model, given)
        assert (report.samples, report.batch_size) == (320, 64)
        assert bool(report.evaluations) == labelled
        assert ("BNX206" in report.skipped) != labelled
    assert {row.data for row in bnext.doctor(model, dataset).evaluations} == {
        "training",
        "validation",
    }


def test_not_all_of_many_samples_are_looked_at():
    x, y = images(640)
    order = np.argsort(y, kind="stable")
    model = settled(ours(HEALTHY), x)
    report = bnext.doctor(model, (x[order], y[order]), samples=256, shuffle=False)
    assert report.samples == 256
    assert "BNX207" in report.codes  # from everywhere, so that the order shows


def test_without_data_the_shape_is_enough(build):
    model = build(at(0, ("dropout", 0.5), MLP))
    report = bnext.doctor(model, input_shape=(3, 8, 8), batch_size=32, dataset_size=1000)
    assert report.codes == ["BNX106"]
    assert (report.samples, report.batch_size) == (0, 32)
    assert set(report.skipped.values()) == {"needs data"}
    assert set(report.skipped) == {code for code, row in RULES.items() if row.needs}


def test_untrained_networks_have_no_stale_statistics(build):
    x, y = images(256)
    report = bnext.doctor(build(HEALTHY), (x, y), validation=(x, y))
    assert report.ok, str(report)
    assert report.skipped["BNX201"] == "no training yet"


def test_what_cannot_be_checked_says_why():
    x, y = images(256)
    model = settled(ours(HEALTHY), x)
    skipped = bnext.doctor(model, (x, y.astype(np.float32))).skipped
    assert "loss=" in skipped["BNX206"]
    for samples in (2, 64, 128):
        skipped = bnext.doctor(model, (x[:samples], y[:samples])).skipped
        assert skipped["BNX207"] == "needs 4 batches or more"
    assert skipped["BNX210"] == "needs the initial state"


def test_values_that_are_not_finite_do_not_stop_it(build):
    x, y = images(256)
    model = settled(build(HEALTHY), x)
    x[3, 1] = np.inf
    report = bnext.doctor(model, (x, y), validation=(x, y))
    assert "BNX212" in report.codes
    json.loads(report.to_json())


def test_select_and_ignore():
    x, y = images(256)
    model = settled(ours(BEFORE_NORM), x)
    every = bnext.doctor(model, (x, y)).codes
    assert {"BNX105", "BNX205"} <= set(every)
    assert bnext.doctor(model, (x, y), select=["BNX105"]).codes == ["BNX105"]
    assert bnext.doctor(model, (x, y), ignore=["BNX105"]).codes == [
        code for code in every if code != "BNX105"
    ]


def wrong_calls():
    x, y = images(16)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm(192), nn.Linear(192, CLASSES))
    return [
        ("model", TypeError, ("net", x), {}, "model: expected a bnext.nn.Module"),
        ("no norm", ValueError, (nn.Linear(3, 4), x), {}, "expected one BatchNorm layer or more"),
        ("no data", ValueError, (model,), {}, "expected data, or input_shape"),
        ("kind of data", TypeError, (model, 3), {}, "data: expected arrays x or (x, y)"),
        ("text", TypeError, (model, "digits"), {}, "got str"),
        ("labels", ValueError, (model, (x, y[:3])), {}, "expected 16 labels, one for each"),
        ("range", ValueError, (model, (x, y + 4)), {}, "labels: expected values from 0 to 3"),
        (
            "validation",
            ValueError,
            (model, (x, y)),
            {"validation": (x, y - 1)},
            "validation: labels: expected values from 0 to 3",
        ),
        ("empty", ValueError, (model, x[:0]), {}, "expected one sample or more"),
        ("no batch", ValueError, (model, []), {}, "expected one batch or more"),
        ("batches", TypeError, (model, [{"x": x}]), {}, "expected batches that are arrays"),
        ("code", ValueError, (model, x), {"select": ["BNX999"]}, "got 'BNX999'"),
        ("batch", ValueError, (model, x), {"batch_size": 0}, "batch_size: expected 1 or more"),
        ("samples", TypeError, (model, x), {"samples": 2.5}, "samples: expected an integer"),
        ("last", ValueError, (model, x), {"last_batch": "pad"}, '"merge", "keep" or "drop"'),
        ("loss", ValueError, (model, (x, y)), {"loss": lambda o, y: 1.0}, "one value for each"),
        (
            "initial",
            ValueError,
            (ours(HEALTHY), x),
            {"initial": {}},
            "initial: expected the weight",
        ),
        ("shape", ValueError, (model, x[:, :1]), {}, "expected 192 channels"),
    ]


@pytest.mark.parametrize("case", wrong_calls(), ids=lambda case: case[0])
def test_wrong_calls(case):
    _, kind, arguments, options, message = case
    with pytest.raises(kind, match=re.escape(message)):
        bnext.doctor(*arguments, **options)


# -- output ----------------------------------------------------------------------------
def test_json_has_everything_and_no_nan():
    x, y = images(256)
    report = bnext.doctor(settled(ours(BEFORE_NORM), x), (x, y))

    def refuse(value):
        raise AssertionError(value)

    document = json.loads(report.to_json(), parse_constant=refuse)
    assert document["version"] == 1
    assert list(document) == [
        *("version", "ok", "framework", "batch_size", "samples"),
        *("findings", "layers", "evaluations", "skipped"),
    ]
    assert document["ok"] is False
    assert len(document["findings"]) == len(report.findings)
    for found, finding in zip(document["findings"], report.findings, strict=True):
        row = RULES[finding.code]
        assert found["code"] == finding.code
        assert found["layer"] == finding.layer
        assert found["figure"] == pytest.approx(finding.figure)
        assert found["threshold"] == row.threshold
        assert (found["meaning"], found["advice"]) == (row.meaning, row.advice)
        assert found["severity"] in ("warning", "critical")
    assert [row["layer"] for row in document["layers"]] == ["1", "5"]
    assert document["layers"][0]["growth"] is None


def test_text_names_code_layer_figure_and_advice():
    x, y = images(256)
    report = bnext.doctor(settled(ours(BEFORE_NORM), x), (x, y))
    text = " ".join(str(report).split())
    for finding in report.findings:
        for part in (finding.code, finding.layer, finding.meaning, finding.advice):
            assert part in text
        assert f"{finding.figure:.4g}" in text
    assert max(map(len, str(report).splitlines())) < 200


# -- the command -----------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = random.default_generator.state, random._initial_rng
    x, y = images(400)
    np.savez("four.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    yield tmp_path
    random.default_generator.state, random._initial_rng = before


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_on_models(capsys, folder):
    common = ["--data", "npz:four.npz", "--batch-size", 32]
    status, out, err = run(capsys, "doctor", "cnn:width=8", *common)
    assert (status, err) == (0, "")
    assert "No findings." in out
    faulty = ["doctor", "cnn:width=8,dropout=0.5,dropout-position=before-norm", *common]
    status, out, err = run(capsys, *faulty)
    assert (status, err) == (1, "")
    assert "BNX105" in out
    status, out, _ = run(capsys, *faulty, "--json", "--select", "BNX105")
    assert status == 1
    document = json.loads(out)
    assert {finding["code"] for finding in document["findings"]} == {"BNX105"}
    assert document["batch_size"] == 32
    assert run(capsys, *faulty, "--ignore", "BNX105", "BNX205")[0] == 0


def test_command_on_a_run(capsys, folder):
    common = ["--data", "npz:four.npz", "--width", 8, "--depth", 1, "--no-progress"]
    arguments = ["--epochs", 3, "--batch-size", 32, "--out", "r", "--dropout", 0]
    assert run(capsys, "train", *common, *arguments)[0] == 0
    status, out, _ = run(capsys, "doctor", "r", "--json")
    document = json.loads(out)
    assert (document["batch_size"], document["samples"]) == (32, 288)
    assert document["layers"][0]["growth"] is not None  # initial weights follow from the seed
    assert status == (not document["ok"])
    assert "BNX210" not in document["skipped"]
    (validation,) = [
        row
        for row in document["evaluations"]
        if (row["data"], row["statistics"]) == ("validation", "running")
    ]
    _, text, _ = run(capsys, "evaluate", "r")
    assert f"test loss {validation['loss']:.4f}" in text


def test_command_on_files(capsys, folder):
    (folder / "net.py").write_text(
        "from bnext import nn\n"
        "def good():\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm(192), nn.Linear(192, 4))\n"
        "def bad():\n"
        "    raise RuntimeError('no')\n"
    )
    common = ["--data", "npz:four.npz"]
    assert run(capsys, "doctor", "net.py:good", *common)[0] == 0
    if importlib.util.find_spec("torch"):
        (folder / "theirs.py").write_text(
            "from torch import nn\n"
            "def good():\n"
            "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4))\n"
            "def wrong():\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(7, 4), nn.BatchNorm1d(4))\n"
        )
        status, out, _ = run(capsys, "doctor", "theirs.py:good", "--json", *common)
        assert (status, json.loads(out)["framework"]) == (0, "torch")
        status, _, err = run(capsys, "doctor", "theirs.py:wrong", *common)
        assert status == 2
        assert "shapes" in err
        assert err.count("\n") == 1
    for model, message in (
        ("net.py:bad", "net.py:bad: RuntimeError: no"),
        ("net.py:missing", "AttributeError"),
        ("other.py:good", "other.py: no such file"),
        ("no.module:good", "ModuleNotFoundError"),
        ("json:loads", "TypeError"),
    ):
        status, out, err = run(capsys, "doctor", model, *common)
        assert (status, out) == (2, "")
        assert message in err


def test_models_that_fail_are_no_findings(capsys, folder):
    pytest.importorskip("torch", reason="the networks are PyTorch's")
    (folder / "fails.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, error):\n"
        "        super().__init__()\n"
        "        self.norm, self.error = torch.nn.BatchNorm2d(3), error\n"
        "    def forward(self, x):\n"
        "        raise self.error\n"
        "def key(): return Net(KeyError('a'))\n"
        "def file(): return Net(FileNotFoundError('b'))\n"
        "def claim(): return Net(AssertionError())\n"
        "def leave(): raise SystemExit(1)\n"
    )
    for called, message in (
        ("key", "KeyError: 'a'"),
        ("file", "FileNotFoundError: b"),
        ("claim", "AssertionError: "),
        ("leave", "fails.py:leave: SystemExit: 1"),
    ):
        status, out, err = run(capsys, "doctor", f"fails.py:{called}", "--data", "npz:four.npz")
        assert (status, out, err) == (2, "", f"bnext: error: {message}\n")


def test_files_may_import_what_is_beside_them(capsys, folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "beside_it.py").write_text("features = 192\n")
    (folder / "sub" / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from beside_it import features\n"
        "from bnext import nn\n"
        "@dataclass\n"
        "class Options:\n"
        "    count: ClassVar[int] = 1\n"
        "    features: int = features\n"
        "def make():\n"
        "    features = Options().features\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm(features), nn.Linear(features, 4))\n"
    )
    (folder / "in_this_folder.py").write_text((folder / "sub" / "json.py").read_text())
    before = sys.path[:]
    common = ["--data", "npz:four.npz"]
    assert run(capsys, "doctor", "sub/json.py:make", *common)[0] == 0
    assert run(capsys, "doctor", "in_this_folder:make", *common)[0] == 0
    assert sys.modules["json"] is json
    assert sys.path == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "vgg"], "vgg: expected a checkpoint, FILE.py:NAME, or one of mlp, cnn"),
        (["doctor", "cnn:widht=8"], "did you mean 'width'?"),
        (["doctor", "cnn:width=many"], "width: expected a whole number, got 'many'"),
        (["doctor", "cnn", "--select", "BNX1"], "got 'BNX1'"),
        (["doctor", "mlp:norm=none"], "expected one BatchNorm layer or more"),
        (["doctor", "--batch-size", "0"], "--batch-size"),
        (["doctor", "--data", "nowhere"], "unknown data set 'nowhere'"),
    ],
)
def test_wrong_commands(capsys, folder, arguments, message):
    if "--data" not in arguments:
        arguments = [*arguments, "--data", "npz:four.npz"]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# -- documentation ---------------------------------------------------------------------
@pytest.mark.parametrize("code", RULES)
def test_every_code_has_its_page(code):
    row = RULES[code]
    text = (DOCS / "doctor" / f"{code}.md").read_text()
    words = " ".join(text.split())
    assert text.startswith(f"# {code}: {row.title}\n")
    for part in (row.meaning, row.advice, row.figure, row.limits, row.source):
        assert part in words, part
    for title in ("Why it matters", "How it is measured", "Threshold", "What to do", "Example"):
        assert f"## {title}\n" in text
    assert f'"{code}" in ' in text  # the example, which test_readme runs
    assert f"[{code}](doctor/{code}.md)" in (DOCS / "doctor.md").read_text()


def test_no_page_without_code():
    assert sorted(path.stem for path in (DOCS / "doctor").glob("*.md")) == list(RULES)


def test_calibration_in_the_page_is_that_of_the_script():
    result = json.loads((DOCS / "doctor" / "calibration.json").read_text())
    text = (DOCS / "doctor.md").read_text()
    assert result["healthy_runs"] == 30
    assert set(result["false_alarms"]) == set(RULES)
    for code, count in result["false_alarms"].items():
        assert count / 30 < 0.05, code
        assert re.search(rf"\[{code}\].*\| {count} of 30 \|", text), code
    for fault, row in result["faults"].items():
        assert row["found"] == row["runs"] > 0, fault
        assert f"| {fault} |" in text
        assert f"| {row['found']} of {row['runs']} |" in text


def test_examples_of_docstrings():
    for module in (_doctor, models):
        assert doctest.testmod(module).failed == 0


def test_importing_bnext_needs_numpy_alone():
    code = "import sys, bnext; print({'torch', 'scipy', 'sklearn'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_public_names():
    assert bnext.doctor is diagnosis.doctor
    assert set(diagnosis.__all__) == {"RULES", "Finding", "Report", "Rule", "doctor"}
    assert list(batch_norms(ours(HEALTHY)))
