"""bnext.torch.accelerate: whole models, and what is fused in them and what is not."""

import copy
import gc
import pickle
import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='bnext.torch needs PyTorch: pip install "bnext[torch]"')

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import bnext.torch as bt  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Block(nn.Module):
    """The layers of a basic block of ResNet; its subclasses call them."""

    def __init__(self, activation=nn.ReLU, drop=0.2, shortcut=False):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = activation()
        self.drop = nn.Dropout(drop)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if shortcut else None
        self.scale = 1
        self.steps = 0
        self.sizes = [1, 2]

    def forward(self, x):
        identity = x
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.drop(self.act(out))


class PreActivation(Block):
    def forward(self, x):
        out = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(self.drop(nn.functional.relu(self.bn2(out), inplace=True)))


class Inverted(Block):  # as in MobileNetV2
    def forward(self, x):
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))


class Scaled(Block):
    def forward(self, x):
        return self.act(self.bn1(self.conv1(x)) + self.scale) * self.scale


class TwoUses(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.act(out) + out


class SharedNorm(Block):
    def forward(self, x):
        return self.act(self.bn1(self.act(self.bn1(x))))


class ChangesOther(Block):
    has_gradient = False

    def forward(self, x):
        x += self.bn1(self.conv1(x))
        return self.act(x)


class ChangesInput(Block):
    has_gradient = False

    def forward(self, x):
        y = x * 2
        out = self.bn1(y)
        y.add_(1)
        return self.act(out) + y


class AddsItself(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.act(out + out)


class ByDefault(Block):
    def forward(self, x, mask=None):
        return self.act(self.bn1(x))


class ByValue(Block):
    def forward(self, x):
        return self.act(self.bn1(x)) if x.sum() > 0 else x


class ByType(Block):
    def forward(self, x):
        return self.act(self.bn1(x)) if isinstance(x, torch.Tensor) else x


class ByNone(Block):
    def forward(self, x):
        y = self.bn1(x)
        return x if y is None else self.act(y)


class WithoutGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            x = self.act(self.bn1(x))
        return x


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.act(self.bn1(x))


class Checkpointed(Block):
    def forward(self, x):
        return self.act(self.bn2(checkpoint(self.conv1, x, use_reentrant=False)))


class Counts(Block):
    def forward(self, x):
        self.steps += 1
        return self.act(self.bn1(x))


class ReadsList(Block):
    def forward(self, x):
        return self.act(self.bn1(x)) * self.sizes[0]


class Stem(Block):  # the second BatchNorm adds what the first one became part of
    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return self.drop(torch.relu(self.bn2(self.conv2(out)) + out))


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        for norm in self.norms:
            x = self.act(norm(x))
        return x


class DropsPath(Block):
    def forward(self, x):
        return x if torch.rand(()) < 0.5 else self.act(x + self.bn1(x))


class DropsPathByPython(Block):
    def forward(self, x):
        return x if random.random() < 0.5 else self.act(x + self.bn1(x))


class ReadsBuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, x):
        return self.act(self.bn1(x)) if self.gain > 1 else x


class Tries(Block):
    def forward(self, x):
        try:
            scale = int(x.shape[0])
        except TypeError:
            scale = 100
        return self.act(self.bn1(x)) * scale


class AsksForTypeItself(Block):
    def forward(self, x):
        y = self.act(self.bn1(x))
        return y if type(x) is torch.Tensor else y * 0


class Prints(Block):
    def forward(self, x):
        print(end="")
        return self.act(self.bn1(x))


class ScalesByNumPy(Block):
    def forward(self, x):
        return self.act(self.bn1(x)) / np.sqrt(2.0)


class CountsInBuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x):
        self.calls.add_(1)
        return self.act(self.bn1(x)) * self.calls


class AsksItself(Block):
    doubles = False

    def __init__(self):
        super().__init__()
        self.register_parameter("gain", None)

    def forward(self, x):
        y = self.act(self.bn1(x))
        if self.gain is not None:
            y = y * self.gain
        if hasattr(self, "offset"):
            y = y + self.offset
        return y * 2 if self.doubles else y


class ReturnsDictionary(Block):
    def forward(self, x):
        return OrderedDict(out=self.act(self.bn1(x)))["out"]


class CallsWithDictionary(Block):
    def __init__(self):
        super().__init__()
        self.last = Last()

    def forward(self, x):
        return self.last(OrderedDict(out=self.act(self.bn1(x))))


class Last(nn.Module):
    def forward(self, values):
        return values["out"]


class AsksForAttribute(Block):
    def forward(self, x):
        y = self.act(self.bn1(x))
        return y * 0 if hasattr(x, "mask") else y


class AsksForGrad(Block):
    def forward(self, x):
        y = self.act(self.bn1(x))
        return y * 2 if torch.is_grad_enabled() else y


FUSED = [
    (Block(), {"bn1": "relu", "bn2": "residual + relu + dropout"}),
    (Block(shortcut=True), {"bn1": "relu", "bn2": "residual + relu + dropout"}),
    (Block(nn.LeakyReLU), {"bn1": "leaky_relu", "bn2": "residual + leaky_relu + dropout"}),
    (Block(nn.SiLU), {"bn1": "silu", "bn2": "residual + silu + dropout"}),
    (Block(lambda: nn.GELU("tanh")), {"bn1": "gelu", "bn2": "residual + gelu + dropout"}),
    (Block(nn.GELU), {"bn2": "residual"}),
    (PreActivation(), {"bn1": "relu", "bn2": "relu + dropout"}),
    (Inverted(), {"bn1": "relu", "bn2": "residual"}),
    (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Dropout(0.3)),
        {"1": "relu6 + dropout"},
    ),
    (
        nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.Hardswish()), nn.Tanh()),
        {"0.0": "hardswish"},
    ),
    (
        nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()),
        {"0.1": "relu"},
    ),
    (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3)), {"0": "dropout"}),
    (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(0.3)), {}),
    (nn.Sequential(nn.BatchNorm2d(4), nn.Tanh(), nn.ReLU()), {}),
    (TwoUses(), {}),
    (SharedNorm(), {}),
    (ChangesOther(), {}),
    (ChangesInput(), {}),
    (AddsItself(), {}),
    (Scaled(), {}),
    (Stem(), {"bn1": "relu", "bn2": "residual + relu + dropout"}),
    (Bank(), {"norms.0": "relu", "norms.1": "relu"}),
    (ReturnsDictionary(), {"bn1": "relu"}),
    (ScalesByNumPy(), {"bn1": "relu"}),
    (CountsInBuffer(), {"bn1": "relu"}),
    (AsksItself(), {"bn1": "relu"}),
]
REFUSED = [
    (ByDefault(), "argument mask of forward may be left out"),
    (ByValue(), "symbolically traced variables cannot be used as inputs to control flow"),
    (ByType(), "forward asks for the type of a value"),
    (ByNone(), "forward compares a value with None, or by `is`"),
    (WithoutGrad(), "forward uses torch.autograd.grad_mode"),
    (Decorated(), "forward uses torch.autograd.grad_mode"),
    (Checkpointed(), "forward uses torch."),
    (Counts(), "forward sets steps"),
    (ReadsList(), "forward reads sizes, a list"),
    (DropsPath(), "forward looks at the numbers in a tensor"),
    (DropsPathByPython(), "forward draws random numbers"),
    (ReadsBuffer(), "symbolically traced variables cannot be used as inputs to control flow"),
    (Tries(), "a try statement in forward"),
    (AsksForTypeItself(), "forward sets a global variable, or asks for types"),
    (Prints(), "forward uses print"),
    (CallsWithDictionary(), "forward makes a container that a graph has not: OrderedDict"),
    (AsksForAttribute(), "forward asks whether a value has mask"),
    (AsksForGrad(), "forward uses is_grad_enabled"),
]


def name_of(case):
    return type(case[0]).__name__


def passes(model, x, seed=7):
    """Output, gradients and buffers after a pass, and what became of the input."""
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    with torch.set_grad_enabled(getattr(model, "has_gradient", True)):
        y = model(inner)
    if y.requires_grad:
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
        y.backward(g)
    grads = [leaf.grad, *(p.grad for p in model.parameters())]
    return [y, inner, *(torch.zeros(()) if g is None else g for g in grads), *model.buffers()]


def check_same(model, other, x):
    x = x.double()
    for found, want in zip(passes(model.double(), x), passes(other.double(), x), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", FUSED, ids=name_of)
def test_fused_is_the_same(case):
    model, expected = copy.deepcopy(case[0]), case[1]
    plain, _ = bt.accelerate(copy.deepcopy(model), fuse=False)  # with the same masks
    model, report = bt.accelerate(model)
    assert report.fused == expected
    assert report.not_fused == {}
    for training in (True, False):
        check_same(model.train(training), plain.train(training), torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_a_graph_cannot_stand_for_is_left(case):
    model, reason = copy.deepcopy(case[0]), case[1]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    model, report = bt.accelerate(model)
    assert report.fused == {}
    assert report.not_fused[""].startswith(reason)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    check_same(model, case[0], torch.randn(3, 4, 5, 5))


def test_model_stays_the_object_it_is():
    model = nn.Sequential(Block(), nn.Flatten(), nn.BatchNorm1d(100))
    ids = [id(x) for x in (*model.modules(), *model.parameters(), *model.buffers())]
    keys = list(model.state_dict())
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    found, report = bt.accelerate(model)
    assert found is model
    assert ids == [id(x) for x in (*model.modules(), *model.parameters(), *model.buffers())]
    assert list(model.state_dict()) == keys
    assert type(model[2]) is bt.BatchNorm1d
    model(torch.randn(2, 4, 5, 5))
    assert calls == [1]
    assert set(report.replaced) == {"0.bn1", "0.bn2", "0.drop", "2"}
    # Once more changes nothing.
    assert str(bt.accelerate(model)[1]).startswith("replaced: none")
    assert bt.restore(model) is model
    assert {type(m).__module__.partition(".")[0] for m in model.modules()} == {"torch", __name__}
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"accelerate: model: expected a torch\.nn\.Module, got l"):
        bt.accelerate([nn.BatchNorm2d(3)])


def test_a_module_by_itself():
    model, report = bt.accelerate(nn.Dropout(0.1))
    assert type(model) is bt.Dropout
    assert report.replaced == {"": "Dropout"}
    assert "(the model): Dropout" in str(report)


class Subclass(nn.BatchNorm2d):
    pass


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_reasons_to_keep():
    other = nn.BatchNorm2d(3)
    other.forward = lambda x: x
    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Doubled())
    model = nn.ModuleDict(
        {
            "subclass": Subclass(3),
            "instance": nn.InstanceNorm2d(3),
            "meta": nn.BatchNorm2d(3, device="meta"),
            "other": other,
            "parametrized": parametrized,
            "lazy": nn.LazyBatchNorm2d(),
        }
    )
    _, report = bt.accelerate(model)
    assert report.replaced == {}
    assert report.kept == {
        "subclass": "Subclass has no counterpart",
        "instance": "InstanceNorm2d has no counterpart",
        "meta": "on meta",
        "other": "its forward method was replaced",
        "parametrized": "ParametrizedBatchNorm2d has no counterpart",
        "lazy": "LazyBatchNorm2d has no counterpart",
    }


# -- what changes afterwards -----------------------------------------------------------------------
def replaces_child(model):
    model.act = nn.Tanh()


def changes_attribute(model):
    model.scale = 3


def changes_sequential(model):
    model.shortcut.append(nn.Tanh())


def removes_child(model):
    model.shortcut = None


def adds_hook(model):
    model.bn2.register_forward_hook(lambda module, args, y: 2 * y)


def adds_hook_to_what_is_skipped(model):
    model.act.register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def adds_hook_to_sequential(model):
    model.shortcut.register_forward_hook(lambda module, args, y: 2 * y)


def changes_slope(model):
    model.act.negative_slope = 0.5


def changes_dropout(model):
    model.drop.p = 0.7


def freezes_norm(model):
    model.bn2.eval()


def freezes_dropout(model):
    model.drop.eval()


def replaces_forward_of_what_is_skipped(model):
    model.act.forward = torch.tanh


def replaces_forward_of_norm(model):
    model.bn2.forward = torch.tanh


@pytest.mark.parametrize(
    "change",
    [
        replaces_child,
        changes_attribute,
        changes_sequential,
        removes_child,
        adds_hook,
        adds_hook_to_what_is_skipped,
        adds_hook_to_sequential,
        changes_slope,
        changes_dropout,
        freezes_norm,
        freezes_dropout,
        replaces_forward_of_what_is_skipped,
        replaces_forward_of_norm,
    ],
)
def test_changes_afterwards_count(change):
    class Changing(Block):
        def forward(self, x):
            out = self.act(self.bn1(self.conv1(x)) + self.shortcut(x)) if self.shortcut else x
            return self.drop(self.act(self.bn2(self.conv2(out)))) * self.scale

    model = Changing(nn.LeakyReLU, shortcut=True)
    plain, _ = bt.accelerate(copy.deepcopy(model), fuse=False)
    model, report = bt.accelerate(model)
    assert report.fused == {"bn1": "residual + leaky_relu", "bn2": "leaky_relu + dropout"}
    x = torch.randn(3, 4, 5, 5)
    check_same(model, plain, x)
    for each in (model, plain):
        change(each)
    check_same(model, plain, x)


def test_changes_of_containers_count():
    for change in (
        lambda model: model.norms.append(nn.BatchNorm2d(4)),
        lambda model: model.norms.__setitem__(1, nn.GroupNorm(2, 4)),
        lambda model: model.norms.pop(1),
    ):
        model, plain = Bank(), Bank()
        plain.load_state_dict(model.state_dict())
        bt.accelerate(model)
        for each in (model, plain):
            change(each)
        check_same(model, plain, torch.randn(3, 4, 5, 5))


def test_what_the_garbage_collector_calls_is_not_of_forward():
    def callback(phase, info):
        global collected
        collected = phase

    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        _, report = bt.accelerate(Block())
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert report.not_fused == {}


@pytest.mark.parametrize("name", ["0", "0.0"])
def test_hooks_on_nested_containers_run(name):
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(4))), nn.ReLU())
    model, report = bt.accelerate(model)
    assert report.fused == {"0.0.0": "relu"}
    model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 0 + 2)
    assert (model(torch.randn(3, 4, 5, 5)) == 2).all()


def sets_attribute_of_class(model):
    model.doubles = True


def sets_parameter(model):
    model.gain = nn.Parameter(torch.full((), 3.0))


@pytest.mark.parametrize("change", [sets_attribute_of_class, sets_parameter])
def test_changes_of_what_was_not_there_count(change):
    model, plain = AsksItself(), AsksItself()
    plain.load_state_dict(model.state_dict())
    _, report = bt.accelerate(model)
    assert report.fused == {"bn1": "relu"}
    for each in (model, plain):
        change(each)
    check_same(model, plain, torch.randn(3, 4, 5, 5))


def test_what_changed_is_fused_again():
    model, report = bt.accelerate(Block())
    assert bt.accelerate(model)[1].fused == {}
    model.bn2 = nn.BatchNorm2d(4)
    _, again = bt.accelerate(model)
    assert again.fused == report.fused
    assert model.forward.holds()


def test_sums_in_place_keep_their_kind():
    class Adds(Block):
        def forward(self, x, other):
            out = self.bn1(x)
            out += other
            return self.drop(self.act(out))

    model, report = bt.accelerate(Adds(drop=0.0))
    assert report.fused == {"bn1": "residual + relu + dropout"}
    x = torch.randn(3, 4, 5, 5)
    y = model(x, x.double())
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, model(x, x))
    torch.testing.assert_close(model(x, x[:1]), model(x, x[:1].expand_as(x)))
    with pytest.raises(RuntimeError, match="broadcast shape"):
        model(x, x[None])


def test_copies_are_called_by_several_threads():
    """A copy is made whole: torch.fx, which changes nn.Module, is not asked again."""
    model, _ = bt.accelerate(nn.Sequential(*(Block() for _ in range(4))).eval())
    x = torch.randn(2, 4, 5, 5)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda each: each(x), [copy.deepcopy(model) for _ in range(8)]))
            assert all(torch.equal(result, results[0]) for result in results)
    assert not hasattr(nn.Module.__call__, "__wrapped__")


def test_hooks_on_all_modules_run():
    model, _ = bt.accelerate(Block())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(torch.randn(3, 4, 5, 5))
    finally:
        handle.remove()
    assert seen == [model.conv1, model.bn1, model.act, model.conv2, model.bn2, model.act,
                    model.drop, model]  # fmt: skip


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_their_own(copy_of):
    model, _ = bt.accelerate(Block())
    other = copy_of(model)
    x = torch.randn(3, 4, 5, 5)
    check_same(other, model, x)
    assert other.forward.owner is other
    assert other.forward.function is not None
    with torch.no_grad():
        other.bn1.weight.zero_()
    assert model.bn1.weight.any()
    assert not torch.equal(other.eval()(x.double()), model.eval()(x.double()))


def test_fused_under_compile_and_other_callers():
    model, _ = bt.accelerate(Block(drop=0.0))
    plain = bt.restore(copy.deepcopy(model))
    x = torch.randn(3, 4, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(model(x=x), plain(x))
    batches = torch.randn(2, 3, 4, 5, 5)
    model.eval(), plain.eval()
    torch.testing.assert_close(torch.vmap(model)(batches), torch.vmap(plain)(batches))


def test_fx_keeps_modules_as_those_of_pytorch():
    model = nn.Sequential(Block(), nn.Dropout2d(0.5), nn.SyncBatchNorm(4), nn.AlphaDropout(0.5))
    expected = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes]
    traced = torch.fx.symbolic_trace(bt.accelerate(model)[0])
    assert [node.target for node in traced.graph.nodes] == expected
    for training in (True, False):
        check_same(
            traced.train(training), copy.deepcopy(model).train(training), torch.randn(3, 4, 5, 5)
        )


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bt.BatchNormAct2d(4)

    def forward(self, x, residual):
        return self.norm(x, residual)


def test_fx_keeps_modules_of_ours_with_all_arguments():
    *_, norm, _ = torch.fx.symbolic_trace(Ours()).graph.nodes
    assert norm.target == "norm"
    assert [str(node) for node in norm.args] == ["x", "residual"]


def test_one_pass_is_saved_by_fusing():
    model, _ = bt.accelerate(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)))
    y = model(torch.randn(3, 4, 5, 5))
    assert type(y.grad_fn).__name__ == "BatchNormBackward"


# -- training --------------------------------------------------------------------------------------
def classifier(drop):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(drop),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def train(model, steps):
    """Losses of a problem with four classes: in which quarter of the image the light is."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        labels = torch.randint(4, (16,), generator=generator)
        x = torch.randn(16, 1, 8, 8, generator=generator)
        for image, label in zip(x, labels.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[0, row : row + 4, column : column + 4] += 0.7
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.fixture
def one_thread():
    """Processes that wait for each other's threads are slow, and the arrays are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_goes_the_same_way(one_thread):
    model = classifier(0.0)
    other, report = bt.accelerate(copy.deepcopy(model))
    assert len(report.fused) == 2
    # Rounding grows by training; at the start it is all the difference.
    expected, found = train(model, 200), train(other, 200)
    assert (found - expected)[:5].abs().max() < 1e-5
    assert (found - expected).abs().max() < 0.05
    assert found[-50:].mean() < 0.35


def test_training_with_dropout_gets_as_far(one_thread):
    model = classifier(0.3)
    other, _ = bt.accelerate(copy.deepcopy(model))
    expected, found = train(model, 200)[-50:].mean(), train(other, 200)[-50:].mean()
    assert abs(expected - found) < 0.1
