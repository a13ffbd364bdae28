"""Using a trained network: cut at its outputs, and left early by easy images.

``split`` makes stages of any network in memory, ``Cascade`` lets images leave after them, by
thresholds that ``fit_budget`` or ``fit_fractions`` find; ``calibration`` says how far the outputs'
probabilities are to be trusted.
"""

from sire_jax.inference import calibration
from sire_jax.inference.cascade import Cascade, Found
from sire_jax.inference.exit_rules import RULES, Rule, fit_budget, fit_fractions, leave
from sire_jax.inference.stages import Stage, split

__all__ = [
    "RULES",
    "Cascade",
    "Found",
    "Rule",
    "Stage",
    "calibration",
    "fit_budget",
    "fit_fractions",
    "leave",
    "split",
]
