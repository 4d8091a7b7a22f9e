"""Turbo-VBI: weights that are needed come in runs, against a prior of independent weights and pruned neurons."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts import Slice, Units, without
from octavo.forms import Form, Sparse
from octavo.methods.prune.masks import largest
from octavo.recipes.frame import Lab, Stored, Study, gap
from octavo.recipes.frame.data import FASHION, Split, fashion
from octavo.recipes.frame.nets import in_batches, shuffled
from octavo.training import Regimen, accuracy, cross_entropy
from octavo.training.clustered_support import SupportPrior
from octavo.training.regimens.turbo_vbi import SOURCE, TurboVBI
