"""A policy as one ONNX file, which runs without PyTorch."""

from torchrl_bcq.export.exported_policy import ExportedPolicy
from torchrl_bcq.export.exporter import Export, export_policy

__all__ = ["Export", "ExportedPolicy", "export_policy"]
