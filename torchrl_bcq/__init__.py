"""Batch-Constrained deep Q-learning as a set of TorchRL components.

Its names are in ``__init__.pyi``. Each is loaded when it is first used, with the part of TorchRL that it needs.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_rooms = ("data", "functional", "modules", "objectives", "protocols", "trainers")
__all__ = [name for name in _names if name not in _rooms]
__version__ = version("torchrl-bcq")
