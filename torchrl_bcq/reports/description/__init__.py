"""Statistics and possible defects of a dataset."""

from torchrl_bcq.reports.description.describe import Description as Description, describe as describe
