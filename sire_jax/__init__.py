"""Networks that learn from auxiliary outputs, in JAX and Flax.

``import sire_jax as sj`` is all that a notebook needs to train a network. ``__init__.pyi`` lists
what there is; a part is imported when it is first used, so that programs and their workers start
with what they need. What programs do with configs and files, notebooks import by its module, such
as ``from sire_jax import release``.
"""

import lazy_loader

from sire_jax.job import signals

__version__ = "0.1.0"

# Before a program imports what takes seconds.
signals.listen()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
