"""Methods that act while a model trains: one loop, regimens that hook into it, and the losses of distillation."""

from octavo.training.clustered_support import SupportPrior
from octavo.training.formed import formed, forms_of, settle
from octavo.training.loop import fit
from octavo.training.losses import accuracy, cross_entropy, distillation, next_token
from octavo.training.low_rank import low_rank
from octavo.training.one_way import in_stages, one_way
from octavo.training.ranking import few_misses, ranking_loss
from octavo.training.regimens import REGIMENS, HandOver, Regimen, regimen
from octavo.training.regimens.comera import CoMERA, core_rates
from octavo.training.regimens.deeplight import DeepLight
from octavo.training.regimens.drop_and_grow import DropAndGrow
from octavo.training.regimens.dsformer import StraightThroughFactorizer
from octavo.training.regimens.fliqs import FormatSearch
from octavo.training.regimens.gradual_pruning import GradualPruning
from octavo.training.regimens.learned_levels import LearnedLevels
from octavo.training.regimens.maestro import OrderedDropout
from octavo.training.regimens.quantized_training import QuantizedTraining
from octavo.training.regimens.rewinding import Rewinding
from octavo.training.regimens.slimming import Slimming
from octavo.training.regimens.trp import TrainedRankPruning
from octavo.training.regimens.turbo_vbi import TurboVBI
from octavo.training.regimens.vtrans import VTrans
from octavo.training.soft_prompt import Prompted, SoftPrompt
from octavo.training.straight_through import StraightThrough
from octavo.training.widths import recalibrate, truncated

__all__ = [
    "REGIMENS",
    "CoMERA",
    "DeepLight",
    "DropAndGrow",
    "FormatSearch",
    "GradualPruning",
    "HandOver",
    "LearnedLevels",
    "OrderedDropout",
    "Prompted",
    "QuantizedTraining",
    "Regimen",
    "Rewinding",
    "Slimming",
    "SoftPrompt",
    "StraightThrough",
    "StraightThroughFactorizer",
    "SupportPrior",
    "TrainedRankPruning",
    "TurboVBI",
    "VTrans",
    "accuracy",
    "core_rates",
    "cross_entropy",
    "distillation",
    "few_misses",
    "fit",
    "formed",
    "forms_of",
    "in_stages",
    "low_rank",
    "next_token",
    "one_way",
    "ranking_loss",
    "recalibrate",
    "regimen",
    "settle",
    "truncated",
]
