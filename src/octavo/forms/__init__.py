"""How a site's content is stored and run. Many methods find forms; there are few forms, and they nest."""

from octavo.forms.affine import Affine
from octavo.forms.base import Form, form, form_names, restore
from octavo.forms.codebook import Codebook
from octavo.forms.dense import Dense
from octavo.forms.grid import Grid
from octavo.forms.lowrank import LowRank
from octavo.forms.scaled import Scaled
from octavo.forms.sparse import Sparse
from octavo.forms.sum import Sum
from octavo.forms.trellis import Trellis

__all__ = [
    "Affine",
    "Codebook",
    "Dense",
    "Form",
    "Grid",
    "LowRank",
    "Scaled",
    "Sparse",
    "Sum",
    "Trellis",
    "form",
    "form_names",
    "restore",
]
