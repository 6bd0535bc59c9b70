"""ONNX: `export` writes a model of ours, `load` makes one of a graph; see ``docs/onnx.md``."""

from bnext.onnx._export import export
from bnext.onnx._graph import Graph
from bnext.onnx._load import load

__all__ = ["Graph", "export", "load"]
