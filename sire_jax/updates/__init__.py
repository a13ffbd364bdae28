"""Update rules: from named losses to new parameters.

A rule is the one place that differentiates. It is given a function of the losses and knows nothing
of the network; which parameters a loss reaches it is told from the traced program
(``sire_jax.traced.reach``).
"""

from sire_jax.updates.joint import joint
from sire_jax.updates.rule import Losses, Updated, UpdateRule

UPDATES = {"joint": joint}

__all__ = ["UPDATES", "Losses", "UpdateRule", "Updated", "joint"]
