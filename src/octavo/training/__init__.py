"""Methods that act while a model trains: one loop, regimens that hook into it, and the losses of distillation."""

from octavo.training.formed import formed, forms_of, settle
from octavo.training.loop import fit
from octavo.training.losses import accuracy, cross_entropy, distillation, next_token
from octavo.training.regimens import REGIMENS, HandOver, Regimen, regimen

__all__ = [
    "REGIMENS",
    "HandOver",
    "Regimen",
    "accuracy",
    "cross_entropy",
    "distillation",
    "fit",
    "formed",
    "forms_of",
    "next_token",
    "regimen",
    "settle",
]
