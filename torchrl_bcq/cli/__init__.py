"""The subcommands of ``torchrl-bcq``."""
