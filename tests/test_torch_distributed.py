"""bnext.torch in several processes: DistributedDataParallel and SyncBatchNorm over gloo."""

import copy
import os

import pytest

torch = pytest.importorskip("torch", reason='bnext.torch needs PyTorch: pip install "bnext[torch]"')

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import bnext.torch as bt  # noqa: E402

if not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")):
    pytest.skip("needs torch.distributed with gloo, and fork", allow_module_level=True)

PROCESSES = 2


@pytest.fixture(autouse=True)
def one_thread():
    """Processes that wait for each other's threads are slow, and the arrays are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_processes(function, path, *args):
    """What ``function(rank, *args)`` returns in each of two processes that know each other."""
    context = torch.multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(rank, function, path, args))
        for rank in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * PROCESSES
    return [torch.load(path / f"{rank}.pt") for rank in range(PROCESSES)]


def _work(rank, function, path, args):
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=PROCESSES
    )
    torch.save(function(rank, *args), path / f"{rank}.pt")
    dist.destroy_process_group()


def passes(model, x, g):
    """Output, gradients and buffers after a pass."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g)
    grads = [p.grad for p in model.parameters()]
    return y.detach(), x.grad, grads, [b.clone() for b in model.buffers()]


def synchronized(rank, model, batches, gradients):
    return passes(copy.deepcopy(model), batches[rank], gradients[rank])


LAYOUTS = {
    "contiguous": lambda x: x,
    "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((3, 3), {}),
        ((5, 2), {"momentum": None}),
        ((4, 0), {"affine": False}),
        ((1, 2), {"track_running_stats": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 2, 4), (4, 1, 1)], ids=str)
def test_sync_batch_norm_is_one_batch(sizes, options, layout, shape, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), *shape, dtype=torch.float64) * 3 + 10
    g = torch.randn_like(x)
    model = bt.SyncBatchNorm(shape[0], **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    whole = bt.BatchNorm2d(shape[0], **options).double()
    whole.load_state_dict(model.state_dict())
    y, grad_x, grads, buffers = passes(whole, x, g)

    parts = [[LAYOUTS[layout](part) for part in value.split(sizes)] for value in (x, g)]
    found = in_processes(synchronized, tmp_path, model, *parts)
    close = torch.testing.assert_close
    close(torch.cat([each[0] for each in found]), y)
    close(torch.cat([each[1] for each in found]), grad_x)
    for own, want in zip(zip(*(each[2] for each in found), strict=True), grads, strict=True):
        close(sum(own), want)
    for each in found:
        close(each[3], buffers)


def refuses(rank):
    norm = bt.SyncBatchNorm(3)
    try:
        norm(torch.ones(1 - rank, 3, 1))
    except ValueError as error:
        return str(error), int(norm.num_batches_tracked)


def test_one_value_in_all_processes_raises(tmp_path):
    message = (
        "SyncBatchNorm: 1 value per channel in all processes together in training mode; "
        "batch statistics need 2 or more"
    )
    assert in_processes(refuses, tmp_path) == [(message, 0)] * 2


def without_samples(rank):
    norm = bt.SyncBatchNorm(3)
    y = norm(torch.ones(0, 3, 2))
    return y.shape, norm.running_mean.clone(), norm.running_var.clone()


def test_no_samples_anywhere_leave_the_statistics(tmp_path):
    for shape, mean, var in in_processes(without_samples, tmp_path):
        assert shape == (0, 3, 2)
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))


def evaluated(rank, model, x):
    return model.eval()(x).detach()


def test_evaluation_needs_no_other(tmp_path):
    model, x = bt.SyncBatchNorm(3), torch.randn(1, 3, 4)
    for found in in_processes(evaluated, tmp_path, model, x):
        torch.testing.assert_close(found, bt.BatchNorm1d(3).eval()(x).detach())


def trained(rank, model, batches):
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in batches[rank]:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0), nn.Conv2d(4, 1, 3)
    ).double()


def test_distributed_data_parallel(tmp_path):
    batches = torch.randn(PROCESSES, 3, 4, 2, 6, 6, dtype=torch.float64)
    plain, ours = network(), network()
    bt.accelerate(ours)
    for name in ("plain", "ours"):
        (tmp_path / name).mkdir()
    expected = in_processes(trained, tmp_path / "plain", plain, batches)
    found = in_processes(trained, tmp_path / "ours", ours, batches)
    for state, want in zip(found, expected, strict=True):
        torch.testing.assert_close(state, want)


def test_synchronized_training_is_that_of_one_process(tmp_path):
    batches = torch.randn(PROCESSES, 3, 4, 2, 6, 6, dtype=torch.float64)
    model = bt.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(model[1]) is bt.SyncBatchNorm
    found = in_processes(trained, tmp_path, model, batches)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)

    one = network()
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    for batch in batches.transpose(0, 1):
        optimizer.zero_grad()
        (one(batch.flatten(0, 1)).square().sum() / PROCESSES).backward()  # DDP averages gradients
        optimizer.step()
    torch.testing.assert_close(found[0], dict(one.state_dict()))


def test_activations_are_not_lost_in_conversion():
    model = nn.Sequential(nn.Linear(3, 3), bt.BatchNormAct1d(3))
    with pytest.raises(TypeError, match="module: 1 is a BatchNormAct1d"):
        bt.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is bt.BatchNormAct1d


def test_accelerate_takes_those_of_pytorch():
    model, report = bt.accelerate(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    assert type(model[1]) is bt.SyncBatchNorm
    assert report.replaced["1"] == "SyncBatchNorm"
    assert type(bt.restore(model)[1]) is nn.SyncBatchNorm
