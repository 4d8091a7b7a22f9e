"""Methods that act while a model trains: one loop, regimens that hook into it, and the losses of distillation."""

from octavo.training.formed import formed, forms_of, settle
from octavo.training.loop import fit
from octavo.training.losses import accuracy, cross_entropy, distillation, next_token
from octavo.training.low_rank import low_rank
from octavo.training.one_way import in_stages, one_way
from octavo.training.regimens import REGIMENS, HandOver, Regimen, regimen
from octavo.training.regimens.comera import CoMERA, core_rates
from octavo.training.regimens.dsformer import StraightThroughFactorizer
from octavo.training.regimens.maestro import OrderedDropout
from octavo.training.regimens.trp import TrainedRankPruning
from octavo.training.soft_prompt import Prompted, SoftPrompt
from octavo.training.widths import recalibrate, truncated

__all__ = [
    "REGIMENS",
    "CoMERA",
    "HandOver",
    "OrderedDropout",
    "Prompted",
    "Regimen",
    "SoftPrompt",
    "StraightThroughFactorizer",
    "TrainedRankPruning",
    "accuracy",
    "core_rates",
    "cross_entropy",
    "distillation",
    "fit",
    "formed",
    "forms_of",
    "in_stages",
    "low_rank",
    "next_token",
    "one_way",
    "recalibrate",
    "regimen",
    "settle",
    "truncated",
]
