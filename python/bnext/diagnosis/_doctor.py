"""`bnext.doctor`: static and measured findings of one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from bnext._table import Table
from bnext.data import Dataset, LastBatch, Normalizer
from bnext.diagnosis import _batches, _measured, _static
from bnext.diagnosis._batches import Batches
from bnext.diagnosis._measured import Channels, Scores
from bnext.diagnosis._network import Graph, Network, Norm, network_of
from bnext.diagnosis._static import finding, typical
from bnext.diagnosis.report import Evaluation, Finding, Layer, Report
from bnext.diagnosis.rules import (
    BEHIND,
    CONSTANT,
    GAP_OF_MEAN,
    GAP_OF_VAR,
    LEAST_BATCHES,
    LEAST_CHANNELS,
    LEAST_LOSS,
    LEAST_VALUES,
    PASSES,
    RULES,
    chance_of_imbalance,
    rule,
)
from bnext.nn.module import Array

__all__ = ["doctor"]


def doctor(
    model: Any,
    data: Any = None,
    *,
    input_shape: tuple[int, ...] | None = None,
    dataset_size: int | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    last_batch: LastBatch | None = None,
    samples: int = 2048,
    validation: Any = None,
    initial: Mapping[str, Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    normalizer: Normalizer | None = None,
    select: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    seed: int = 0,
) -> Report:
    """Look for what is wrong with the BatchNorm and Dropout layers of a network.

    Without data, from the network and the shape of its input alone; with data, also by measuring.
    ``docs/doctor.md`` says what each code means. The model comes back as it was: parameters,
    buffers, modes, hooks and the state of the generators, also after an error.

    Parameters
    ----------
    model : bnext.nn.Module or torch.nn.Module
        Of one input.
    data : array x, (x, y), Dataset or iterable of batches, optional
        Training data as they are given to the model. Batches, such as those of a torch DataLoader,
        are taken as they come, as arrays or tensors x or pairs (x, y); arrays are cut into them.
        Integer labels y and outputs (N, K), or `loss`, are needed for rules about losses.
    input_shape : tuple of int, optional
        Of one sample, in place of `data`; inputs are then normal random numbers.
    dataset_size : int, optional
        Number of training samples, where `data` does not tell.
    batch_size : int, optional
        Of training; 64 if `data` does not tell.
    shuffle : bool, default True
        Whether training shuffles; for arrays.
    last_batch : {"merge", "keep", "drop"}, optional
        See `bnext.data.num_batches`. By default "merge" for bnext and "keep" for PyTorch.
    samples : int, default 2048
        How many of the data to look at, about.
    validation : as `data`, optional
        Other data than those of training; by default the test split of a Dataset.
    initial : mapping, optional
        ``state_dict()`` of the model before training.
    loss : callable, optional
        ``loss(output, y)`` gives an array or tensor (N,), one value for each sample; by default
        the cross-entropy. For PyTorch, both are tensors.
    normalizer : Normalizer, optional
        Applied to each batch.
    select, ignore : iterable of str, optional
        Codes to report (all) and not to report.
    seed : int, default 0
        Of the order of the samples and of dropout.

    Returns
    -------
    Report
        ``print`` shows it; ``.findings``, ``.ok``, ``.codes``, ``.layers``, ``.evaluations``,
        ``.to_json()``.

    Raises
    ------
    ValueError
        If there is no BatchNorm, neither data nor input_shape, no sample, labels that do not
        fit, an unknown code; and whatever the model raises.
    TypeError
        For a model or data of another kind.

    Examples
    --------
    >>> import bnext
    >>> from bnext import nn
    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 256, bias=False), nn.BatchNorm(256))
    >>> report = bnext.doctor(model, input_shape=(64,), dataset_size=1000)
    >>> [(finding.code, finding.layer) for finding in report.findings]
    [('BNX106', '2')]
    """
    network = network_of(model)
    codes = _codes(select, ignore)
    samples = _batches.whole("samples", samples, 2)
    if batch_size is not None:
        batch_size = _batches.whole("batch_size", batch_size, 1)
    if dataset_size is not None:
        dataset_size = _batches.whole("dataset_size", dataset_size, 1)
    last_batch = network.last_batch if last_batch is None else last_batch  # type: ignore[assignment]
    if last_batch not in ("merge", "keep", "drop"):
        raise ValueError(
            f'doctor: last_batch: expected "merge", "keep" or "drop", got {last_batch!r}'
        )
    norms = network.norms()
    if not norms:
        raise ValueError("doctor: model: expected one BatchNorm layer or more, got none")

    options: dict[str, Any] = {
        "batch_size": batch_size,
        "last_batch": last_batch,
        "samples": samples,
        "normalizer": normalizer,
        "seed": seed,
    }
    with network.preserved(), np.errstate(all="ignore"):
        # Loaders, too, may draw from the generators that are preserved.
        if data is None:
            batches = _imagined(input_shape, batch_size or 64, seed)
            dataset_size = batches.batch_size if dataset_size is None else dataset_size
        else:
            batches = _batches.collect(data, shuffle=shuffle, **options)
        if dataset_size is not None:
            usual, last = _batches.sizes(dataset_size, batches.batch_size, last_batch)
            batches = batches._replace(batch_size=usual, last=last)
        held_out = None
        if validation is None and isinstance(data, Dataset):
            validation = data
        if validation is not None:
            held_out = _batches.collect(validation, shuffle=True, where="validation", **options)
        probe = network.convert(batches.probe)
        graph = network.graph(probe)
        diagnosis = _Diagnosis(network, norms, graph, batches, held_out, initial, loss)
        network.seed(seed)
        found = list(_static.findings(network, norms, graph, probe, batches))
        if data is None:
            for code, row in RULES.items():
                if row.needs:
                    diagnosis.skipped[code] = "needs data"
        else:
            diagnosis.measure()
            found += diagnosis.findings()
    report = Report(
        network.framework,
        batches.batch_size,
        0 if data is None else batches.samples,
        sorted(found, key=lambda one: one.code),  # stable: layers stay in order
        diagnosis.layers(),
        Table(Evaluation, diagnosis.evaluations),
        dict(sorted(diagnosis.skipped.items())),
    )
    return report.only(codes)


def _codes(select: Iterable[str] | None, ignore: Iterable[str]) -> list[str]:
    chosen = list(RULES) if select is None else [rule(code).code for code in select]
    out = {rule(code).code for code in ignore}
    return [code for code in chosen if code not in out]


def _imagined(input_shape: tuple[int, ...] | None, batch_size: int, seed: int) -> Batches:
    if input_shape is None:
        raise ValueError("doctor: data: expected data, or input_shape without them, got neither")
    shape = tuple(_batches.whole("input_shape", size, 1) for size in input_shape)
    x = np.random.default_rng(seed).normal(size=(64, *shape)).astype(np.float32)
    return Batches([(x, None)], batch_size, batch_size)


class _Diagnosis:
    """Passes over the data, and what follows from them."""

    def __init__(
        self,
        network: Network,
        norms: list[Norm],
        graph: Graph,
        batches: Batches,
        held_out: Batches | None,
        initial: Mapping[str, Any] | None,
        loss: Callable[[Any, Any], Any] | None,
    ) -> None:
        self.network = network
        self.spatial = _static.values_per_sample(graph, norms)
        self.norms = [norm for norm in norms if norm.name in self.spatial]
        self.graph = graph
        self.given = batches
        self.held_out = held_out
        self.initial = initial
        self.loss = loss
        self.skipped: dict[str, str] = {}
        self.evaluations: list[Evaluation] = []
        self.batch: dict[str, Channels] = {}
        self.running: dict[str, Channels] = {}
        self.training: dict[str, Channels] = {}
        self.scores: dict[str, Scores] = {}
        self.validated: dict[str, Scores] = {}
        self.growth: dict[str, list[tuple[str, float]]] = {}
        self.dropout = any(node.kind == "dropout" and node.p > 0 for node in graph.nodes)
        self.relu = {
            node.name
            for index, node in enumerate(graph.nodes)
            if node.kind == "norm" and self._before_relu(index)
        }

    def _before_relu(self, index: int) -> bool:
        users = self.graph.users(index)
        # A sum with a residual in the same pass is a node of the layer itself.
        while len(users) == 1 and users[0].name == self.graph.nodes[index].name:
            if users[0].kind == "relu":
                return True
            users = self.graph.users(self.graph.nodes.index(users[0]))
        return any(node.kind == "relu" for node in users)

    def _skip(self, reason: str, *codes: str) -> None:
        for code in codes:
            self.skipped.setdefault(code, reason)

    # -- passes ------------------------------------------------------------------------
    def measure(self) -> None:
        network = self.network
        loss = self._loss(self.given)
        items = self._usable(self.given)
        self.running, self.scores["running"] = _measured.passed(
            network, items or self._evaluable(self.given), "running", loss
        )
        if items:
            self.batch, self.scores["batch"] = _measured.passed(
                network, items, "batch", loss, outputs=True
            )
            if self.dropout:
                self.training, _ = _measured.passed(network, items, "training")
        else:
            self._skip(
                "batches of one value per channel (BNX101)",
                *(code for code, row in RULES.items() if row.needs and code != "BNX212"),
            )
        if not self.dropout:
            self._skip("no dropout", "BNX205", "BNX211")
        self._weights()
        self._validate(loss)
        if loss is not None:
            self._reestimate(items, loss)
        self._table()

    def _usable(self, batches: Batches) -> list[tuple[Any, Any]]:
        """Batches that training could have: of 2 or more values per channel."""
        least = min((self.spatial[norm.name] for norm in self.norms), default=1)
        return [(self.network.convert(x), y) for x, y in batches.items if len(x) * least > 1]

    def _evaluable(self, batches: Batches) -> list[tuple[Any, Any]]:
        """Batches of evaluation, which without running statistics is as training."""
        if any(norm.running_mean is None for norm in self.norms):
            return self._usable(batches)
        return [(self.network.convert(x), y) for x, y in batches.items]

    def _loss(self, batches: Batches) -> _measured.Loss | None:
        if not batches.labelled:
            self._skip("needs labels", "BNX206", "BNX211")
            return None
        if self.loss is not None:
            return self.loss
        evaluable = self._evaluable(batches)
        if not evaluable:
            return None
        x, labels = evaluable[0]
        output = self.network.array(self.network.run(x, "running"))
        if output.ndim != 2 or labels.ndim != 1 or labels.dtype.kind not in "iu":
            self._skip("needs integer labels and outputs (N, K), or loss=", "BNX206", "BNX211")
            return None
        given = [(batches, "data")]
        given += [(self.held_out, "validation")] if self.held_out is not None else []
        for one, where in given:
            for _, y in one.items if one.labelled else []:
                if y.min() < 0 or y.max() >= output.shape[1]:
                    raise ValueError(
                        f"doctor: {where}: labels: expected values from 0 to "
                        f"{output.shape[1] - 1}, as the model has outputs, got {y.min()} to "
                        f"{y.max()}"
                    )
        return _measured.default_loss(self.network)

    def _validate(self, loss: _measured.Loss | None) -> None:
        if self.held_out is None:
            self._skip("needs validation data", "BNX211")
        elif loss is not None and self.held_out.labelled:
            items = self._evaluable(self.held_out)
            self.validated["running"] = self._scores(items, "running", loss)
            usable = self._usable(self.held_out)
            if usable:
                self.validated["batch"] = self._scores(usable, "batch", loss)

    def _scores(self, items: list[tuple[Any, Any]], mode: str, loss: _measured.Loss) -> Scores:
        return _measured.passed(self.network, items, mode, loss, collect=False)[1]

    def _reestimate(self, items: list[tuple[Any, Any]], loss: _measured.Loss) -> None:
        """Scores with the statistics of these data; `preserved` takes the old ones back."""
        changed = False
        for norm in self.norms:
            if norm.running_mean is None or not norm.by_batch or norm.name not in self.batch:
                continue
            channels = self.batch[norm.name]
            if channels.finite and channels.count > 1:
                unbiased = channels.var * (channels.count / (channels.count - 1))
                self.network.set_statistics(norm.name, channels.mean, unbiased)
                changed = True
        if changed:
            self.scores["re-estimated"] = self._scores(items, "running", loss)
            if self.held_out is not None and "running" in self.validated:
                held_out = self._evaluable(self.held_out)
                self.validated["re-estimated"] = self._scores(held_out, "running", loss)

    def _table(self) -> None:
        for data, batches, scores in (
            ("training", self.given, self.scores),
            ("validation", self.held_out, self.validated),
        ):
            for statistics in ("batch", "running", "re-estimated"):
                one = scores.get(statistics)
                if one is not None and one.losses is not None and batches is not None:
                    self.evaluations.append(
                        Evaluation(data, statistics, len(one.losses), one.loss, one.accuracy)
                    )

    def _weights(self) -> None:
        """Growth of the weights whose scale BatchNorm cancels."""
        if self.initial is None:
            self._skip("needs the initial state", "BNX210")
            return
        now = self.network.state()
        by_batch = {norm.name for norm in self.norms if norm.by_batch}
        for node in self.graph.nodes:
            found = self.graph.before(node, ("same",)) if node.name in by_batch else None
            if found is None or found[1].kind != "linear":
                continue
            layer = found[1]
            before = self.network.weights(self.initial, layer)
            after = self.network.weights(now, layer)
            if before is None or after is None or before.shape != after.shape:
                raise ValueError(
                    f"doctor: initial: expected the weight of {layer.name!r} as it was before "
                    f"training, got {'none' if before is None else f'shape {before.shape}'}"
                )
            norm = float(np.linalg.norm(before))
            ratio = float(np.linalg.norm(after)) / norm if norm else math.nan
            self.growth.setdefault(node.name, []).append((layer.name, ratio))

    # -- findings ----------------------------------------------------------------------
    def findings(self) -> Iterator[Finding]:
        rows = {row.layer: row for row in self.layers()}
        for norm in self.norms:
            row = rows[norm.name]
            yield from self._finite(norm)
            if norm.by_batch and norm.name in self.batch:
                yield from self._gap(norm, row)
                yield from finding("BNX202", norm.name, row.rse)
                yield from finding("BNX203", norm.name, row.constant)
                yield from finding("BNX205", norm.name, row.shift)
                batches = self.running[norm.name].batches
                if batches >= LEAST_BATCHES and row.imbalance > chance_of_imbalance(batches):
                    yield from finding("BNX207", norm.name, row.imbalance, f"{batches} batches")
                yield from finding("BNX209", norm.name, row.kurtosis)
            if norm.num_features >= LEAST_CHANNELS:
                predicted = f"predicted from weight and bias: {row.dead_predicted:.2g}"
                detail = "" if math.isnan(row.dead_predicted) else predicted
                yield from finding("BNX204", norm.name, row.dead, detail)
                yield from finding("BNX208", norm.name, row.gamma)
            for layer, ratio in self.growth.get(norm.name, []):
                yield from finding("BNX210", layer, ratio, f"before {norm.name!r}")
        yield from self._losses()

    def _finite(self, norm: Norm) -> Iterator[Finding]:
        arrays = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        count = sum(int((~np.isfinite(a)).sum()) for a in arrays if a is not None)
        channels = self.running.get(norm.name)
        where = "parameters or running statistics"
        if channels is not None and not channels.finite:
            count, where = count + 1, where if count else "input"
        yield from finding("BNX212", norm.name, count, where)

    def _gap(self, norm: Norm, row: Layer) -> Iterator[Finding]:
        if norm.running_mean is None or norm.untrained:
            return
        shift, ratio = _measured.gap(norm, self.batch[norm.name])
        kept = norm.channels & np.isfinite(shift) & np.isfinite(ratio)
        if not kept.any():
            return
        detail = (
            f"mean off by {np.abs(shift[kept]).mean():.2g} sigma, variance "
            f"{math.exp(ratio[kept].mean()):.3g} times"
        )
        running, again = self.scores.get("running"), self.scores.get("re-estimated")
        if running and again and running.losses is not None and again.losses is not None:
            same = len(running.losses) == len(again.losses)
            if not (same and _measured.significant(running.losses, again.losses)):
                return
            detail += f"; loss {running.loss:.4g}, re-estimated {again.loss:.4g}"
        else:
            detail += "; not confirmed by a loss"
        yield from finding("BNX201", norm.name, row.gap, detail)

    def _losses(self) -> Iterator[Finding]:
        running, batch = self.scores.get("running"), self.scores.get("batch")
        if running is None or batch is None or running.losses is None or batch.losses is None:
            return
        trained = [norm for norm in self.norms if norm.running_mean is not None]
        if not trained or all(norm.untrained for norm in trained):
            self._skip("no training yet", "BNX201", "BNX206", "BNX211")
            return
        if len(running.losses) == len(batch.losses) and _measured.significant(
            running.losses, batch.losses
        ):
            worse = running.loss - batch.loss
            ratio = running.loss / batch.loss if batch.loss > 0 else math.inf
            if worse > LEAST_LOSS:
                detail = f"{running.loss:.4g} with running, {batch.loss:.4g} with batch statistics"
                yield from finding("BNX206", "", ratio, detail)
        other = self.validated.get("running")
        if other is not None and self.dropout:
            behind = running.accuracy - other.accuracy
            if math.isnan(behind):
                self._skip("needs integer labels and outputs (N, K)", "BNX211")
            elif math.isnan(running.loss + other.loss):
                self._skip("losses that are NaN", "BNX211")
            elif behind < BEHIND:
                detail = f"validation {other.accuracy:.4g}"
                yield from finding("BNX211", "", running.accuracy, detail)

    # -- figures -----------------------------------------------------------------------
    def layers(self) -> Table[Layer]:
        return Table(Layer, [self._layer(norm) for norm in self.norms])

    def _layer(self, norm: Norm) -> Layer:
        samples = self.given.batch_size
        if norm.group:
            samples //= max(1, samples // norm.group)
        row = Layer(norm.name, norm.num_features, samples * self.spatial[norm.name])
        batch = self.batch.get(norm.name)
        row = row._replace(gamma=_measured.near_zero(norm))
        if self.growth.get(norm.name):
            row = row._replace(growth=max(ratio for _, ratio in self.growth[norm.name]))
        if batch is None or not batch.count:
            return row
        varies = norm.channels & (batch.var >= CONSTANT * norm.eps)
        row = row._replace(
            rse=typical(batch.rse(samples), varies),
            correlation=typical(batch.correlation, varies),
            kurtosis=typical(batch.kurtosis, varies),
            constant=_share(batch.var < CONSTANT * norm.eps, norm.channels),
        )
        if norm.running_mean is not None and not norm.untrained:
            row = row._replace(gap=_gap(norm, batch))
        if norm.name in self.relu and batch.count >= LEAST_VALUES:
            row = row._replace(
                dead=_share(batch.positive < PASSES, ~np.isnan(batch.positive)),
                dead_predicted=_measured.predicted_dead(norm),
            )
        training, running = self.training.get(norm.name), self.running.get(norm.name)
        if training is not None and training.count:
            ratio = (batch.var + norm.eps) / (training.var + norm.eps)
            row = row._replace(shift=typical(ratio, varies))
        if running is not None:
            if running.batches >= LEAST_BATCHES:
                row = row._replace(imbalance=typical(running.imbalance, varies))
            else:
                self._skip(f"needs {LEAST_BATCHES} batches or more", "BNX207")
        return row


def _gap(norm: Norm, batch: Channels) -> float:
    shift, ratio = _measured.gap(norm, batch)
    kept = norm.channels & np.isfinite(shift) & np.isfinite(ratio)
    if not kept.any():
        return math.nan
    mean, var = np.abs(shift[kept]).mean(), np.abs(ratio[kept]).mean()
    return float(max(mean / GAP_OF_MEAN, var / math.log(GAP_OF_VAR)))


def _share(which: Array, channels: Array) -> float:
    return float(np.mean(which[channels])) if channels.any() else math.nan
