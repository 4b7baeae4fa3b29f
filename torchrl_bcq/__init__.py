"""Batch-Constrained deep Q-learning as a set of TorchRL components.

``__init__.pyi`` lists the public names. A name is imported when it is first used, together with the TorchRL modules
that this name needs.
"""

import lazy_loader

from torchrl_bcq.version import __version__ as __version__

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_packages = ("data", "evaluation", "export", "functional", "modules", "objectives", "protocols", "reports", "runs",
             "trainers")  # fmt: skip
__all__ = [name for name in _names if name not in _packages]
