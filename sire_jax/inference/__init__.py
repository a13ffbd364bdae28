"""Using a trained network: cut at its outputs, and left early by easy images.

``split`` makes stages of any network in memory, ``Cascade`` lets images leave after them, by
thresholds that ``fit_budget`` or ``fit_fractions`` find; ``calibration`` says how far the outputs'
probabilities are to be trusted. ``load`` loads what ``sire_jax.export`` wrote.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
