"""Reports: descriptions of datasets, learning curves, pictures and videos."""

from torchrl_bcq.reports.description import Description as Description, describe as describe
