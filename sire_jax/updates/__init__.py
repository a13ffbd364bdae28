"""Update rules: from named losses to new parameters.

A rule is the one place that differentiates. It is given a function of the losses and knows nothing
of the network; which parameters a loss reaches it is told from the traced program
(``sire_jax.traced.reach``).
"""

from sire_jax.updates.aggregators import (
    AGGREGATORS,
    IMTLG,
    MGDA,
    Aggregator,
    AlignedMTL,
    CAGrad,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)
from sire_jax.updates.effective_joint import effective_joint
from sire_jax.updates.joint import joint
from sire_jax.updates.multiway import multiway
from sire_jax.updates.observed import Observed, Weighting
from sire_jax.updates.pairwise import pairwise
from sire_jax.updates.rule import Losses, Updated, UpdateRule
from sire_jax.updates.weighted import weighted
from sire_jax.updates.weightings import (
    FAMO,
    WEIGHTINGS,
    DynamicAverage,
    Fixed,
    GradNorm,
    Random,
    Uncertainty,
)

UPDATES = {
    "joint": joint,
    "pairwise": pairwise,
    "multiway": multiway,
    "effective_joint": effective_joint,
}

__all__ = [
    "AGGREGATORS",
    "FAMO",
    "IMTLG",
    "MGDA",
    "UPDATES",
    "WEIGHTINGS",
    "Aggregator",
    "AlignedMTL",
    "CAGrad",
    "DynamicAverage",
    "Fixed",
    "GradNorm",
    "Losses",
    "NashMTL",
    "Observed",
    "PCGrad",
    "Random",
    "Sum",
    "UPGrad",
    "Uncertainty",
    "UpdateRule",
    "Updated",
    "Weighting",
    "effective_joint",
    "joint",
    "multiway",
    "pairwise",
    "weighted",
]
