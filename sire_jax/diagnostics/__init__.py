"""Looks into networks while they train and after: gradients, reconstructions.

Each is imported when it is first used: all draw pictures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
