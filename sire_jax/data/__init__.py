"""Data: sources of images, tasks that say what an example is, augmentation, the on-device feed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
