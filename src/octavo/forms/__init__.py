"""Forms: how a site's content is stored and run. Many methods find a few kinds of forms, which nest."""

from octavo.forms.affine import Affine
from octavo.forms.base import FORMS, Form, form, form_names, restore, with_leaves
from octavo.forms.block_scaled import BlockScaled
from octavo.forms.codebook import Codebook
from octavo.forms.dense import Dense
from octavo.forms.dense_sparse import DenseSparse
from octavo.forms.e8 import E8
from octavo.forms.exact import Exact
from octavo.forms.folded import Folded
from octavo.forms.frequency import Frequency
from octavo.forms.grid import Grid
from octavo.forms.grouped import GroupedLowRank
from octavo.forms.hashed import Hash, Hashed
from octavo.forms.lowrank import LowRank
from octavo.forms.rowblocks import RowBlocks
from octavo.forms.scaled import Scaled, row_scaled
from octavo.forms.separable import Separable
from octavo.forms.sparse import Sparse
from octavo.forms.sum import Sum
from octavo.forms.tensor_train import TensorTrain
from octavo.forms.trellis import Trellis
from octavo.forms.trimmed import Trimmed
from octavo.forms.vectors import Vectors

__all__ = [
    "E8",
    "FORMS",
    "Affine",
    "BlockScaled",
    "Codebook",
    "Dense",
    "DenseSparse",
    "Exact",
    "Folded",
    "Form",
    "Frequency",
    "Grid",
    "GroupedLowRank",
    "Hash",
    "Hashed",
    "LowRank",
    "RowBlocks",
    "Scaled",
    "Separable",
    "Sparse",
    "Sum",
    "TensorTrain",
    "Trellis",
    "Trimmed",
    "Vectors",
    "form",
    "form_names",
    "restore",
    "row_scaled",
    "with_leaves",
]
