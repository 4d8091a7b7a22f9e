"""Compressed embedding tables: trained in place of ``nn.Embedding``, stored as forms whose rows are looked up."""

from octavo.training.tables.base import CompactTable, settle_tables, tables_of, with_tables
from octavo.training.tables.by_form import (
    FormTable,
    frequent_rows,
    hashed_elements,
    hashed_rows,
    quotient_remainder,
    random_dense,
    ranked,
    thin_rows,
    train_of_rows,
    widths_by_frequency,
)
from octavo.training.tables.gates import GatedGroups
from octavo.training.tables.groups import RowGroups
from octavo.training.tables.low_precision import LowPrecision
from octavo.training.tables.merging import merged_rows
from octavo.training.tables.prefixes import Prefixes
from octavo.training.tables.product_codes import ProductCodes, codes_by_frequency
from octavo.training.tables.soft_threshold import SoftThreshold
from octavo.training.tables.width_choice import WidthChoice

__all__ = [
    "CompactTable",
    "FormTable",
    "GatedGroups",
    "LowPrecision",
    "Prefixes",
    "ProductCodes",
    "RowGroups",
    "SoftThreshold",
    "WidthChoice",
    "codes_by_frequency",
    "frequent_rows",
    "hashed_elements",
    "hashed_rows",
    "merged_rows",
    "quotient_remainder",
    "random_dense",
    "ranked",
    "settle_tables",
    "tables_of",
    "thin_rows",
    "train_of_rows",
    "widths_by_frequency",
    "with_tables",
]
