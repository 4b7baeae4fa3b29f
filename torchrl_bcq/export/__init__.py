"""A policy as one ONNX file, which runs without PyTorch."""

from torchrl_bcq.export.exported_policy import ExportedPolicy as ExportedPolicy
from torchrl_bcq.export.exporter import Export as Export, export_policy as export_policy
