"""Methods that act while a model trains: one loop, regimens that hook into it, and the losses of distillation."""

from octavo.training.formed import formed, forms_of, settle
from octavo.training.loop import Regimen, fit
from octavo.training.losses import accuracy, cross_entropy, distillation, next_token

__all__ = [
    "Regimen",
    "accuracy",
    "cross_entropy",
    "distillation",
    "fit",
    "formed",
    "forms_of",
    "next_token",
    "settle",
]
