"""Batch-Constrained deep Q-learning as a set of TorchRL components.

``__init__.pyi`` lists the public names. Each is loaded when it is first used, with the part of TorchRL that it needs.
"""

import lazy_loader

from torchrl_bcq.version import __version__ as __version__

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_packages = ("data", "evaluation", "functional", "modules", "objectives", "protocols", "reports", "runs", "trainers")
__all__ = [name for name in _names if name not in _packages]
