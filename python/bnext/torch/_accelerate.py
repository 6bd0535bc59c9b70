"""A whole model at once: `accelerate` and `restore`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from bnext.torch import _bridge, _dropout, _fuse
from bnext.torch._fuse import NORMS, FusedForward
from bnext.torch._sync_batch_norm import SyncBatchNorm
from bnext.torch._tracing import NotTraceable, is_transparent

OURS = {
    getattr(nn, cls.__name__): cls
    for cls in (
        *NORMS,
        _dropout.Dropout,
        _dropout.Dropout1d,
        _dropout.Dropout2d,
        _dropout.Dropout3d,
        _dropout.AlphaDropout,
        _dropout.FeatureAlphaDropout,
        SyncBatchNorm,
    )
}
"""Our class for each of PyTorch's."""

_THEIRS = {ours: theirs for theirs, ours in OURS.items()}


@dataclass
class Report:
    """What `accelerate` did. The keys are names of modules, "" for the model itself.

    Attributes
    ----------
    replaced : dict
        Modules that are ours now, with the names of their classes.
    kept : dict
        Modules of the same kinds that are PyTorch's still, with the reason.
    fused : dict
        BatchNorms that do what follows them in the same pass, with what that is.
    not_fused : dict
        Modules that call a BatchNorm, and whose forward method could not be rewritten; the reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        titles = {
            "replaced": self.replaced,
            "kept": self.kept,
            "fused with": self.fused,
            "not fused": self.not_fused,
        }
        lines = []
        for title, entries in titles.items():
            lines.append(f"{title}: {len(entries) or 'none'}")
            lines += [f"  {name or '(the model)'}: {what}" for name, what in entries.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, fuse: bool = True) -> tuple[nn.Module, Report]:
    """Let the BatchNorm and Dropout modules of `model` run on bnext, in place.

    Modules stay the objects they are, with parameters, buffers and hooks; only their class
    changes, to the one of `bnext.torch` with the same name. Optimizers and ``state_dict()`` notice
    nothing. Subclasses and modules on other devices are left alone.

    Parameters
    ----------
    model : torch.nn.Module
    fuse : bool, default True
        Also let BatchNorm do what follows it in the same pass: the sum with a residual, an
        activation, Dropout. That is done where `torch.fx` can trace the forward method of the
        module that calls them, and where nothing else sees what lies between.

    Returns
    -------
    model : torch.nn.Module
        The same object.
    report : Report
        What was replaced and fused, what was not, and why.

    Raises
    ------
    TypeError
        If `model` is no module.

    Notes
    -----
    A rewritten forward method is used only while all that it was made of is as it was: the class's
    own method runs once a hook, another child or another value of an attribute is found. What the
    method reads from elsewhere than the module, such as global variables, counts as constant.

    Examples
    --------
    >>> from torch import nn
    >>> import bnext.torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
    >>> model, report = bnext.torch.accelerate(model)
    >>> print(report)
    replaced: 2
      1: BatchNorm2d
      3: Dropout
    kept: none
    fused with: 1
      1: relu + dropout
    not fused: none
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, _NormBase | _DropoutNd) and type(module) not in _THEIRS:
            reason = _reason_to_keep(module)
            if reason:
                report.kept[name] = reason
            else:
                module.__class__ = OURS[type(module)]
                report.replaced[name] = type(module).__name__
    if fuse:
        _fuse_all(model, report)
    return model, report


def _reason_to_keep(module: nn.Module) -> str:
    kind = type(module).__name__
    if type(module) not in OURS:
        return f"{kind} has no counterpart"
    if "forward" in module.__dict__:
        return "its forward method was replaced"
    for tensor in (*module.parameters(), *module.buffers()):
        on_gpu = tensor.device.type == "cuda" and _bridge.gpu_available()
        if tensor.device.type != "cpu" and not on_gpu:
            return f"on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in _bridge.DTYPES:
            return f"of {tensor.dtype}"
    return ""


def _fuse_all(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        if not _has_forward(module) or not _calls_norms(module):
            continue
        forward = module.__dict__.get("forward")
        if isinstance(forward, FusedForward):
            if forward.holds():
                continue
            del module.__dict__["forward"]  # of what it was
        elif forward is not None:
            report.not_fused[name] = "its forward method was replaced"
            continue
        try:
            found = _fuse.fuse(module)
        except NotTraceable as error:
            report.not_fused[name] = str(error)
            continue
        for chain in found:
            report.fused.setdefault(
                f"{name}.{chain.norm.target}" if name else str(chain.norm.target), str(chain)
            )


def _calls_norms(module: nn.Module) -> bool:
    """Whether a forward method may call a BatchNorm of ours itself."""
    return any(
        type(child) in NORMS
        or ((is_transparent(child) or not _has_forward(child)) and _calls_norms(child))
        for child in module.children()
    )


def _has_forward(module: nn.Module) -> bool:
    """Which a ModuleList, for one, has not."""
    return type(module).forward is not nn.Module.forward


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; return `model`.

    All modules of `bnext.torch` that have a counterpart become it again, also those that were made
    as ours: a model can be scripted, or given to somebody without bnext, then.

    Examples
    --------
    >>> from torch import nn
    >>> import bnext.torch
    >>> model, report = bnext.torch.accelerate(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    >>> type(bnext.torch.restore(model)[0]) is nn.BatchNorm1d
    True
    """
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"]
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
    return model
