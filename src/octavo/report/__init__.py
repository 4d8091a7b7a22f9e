"""Reports of a compression run: one offline page, a console table and a model card.

All three read the same record, so that a report can be written again from the JSON beside it.
"""

from octavo.report.overlays import read_overlays, read_report
from octavo.report.page import write, write_json, write_page
from octavo.report.schema import Report
from octavo.report.summary import card, headline, measured, table, told

__all__ = [
    "Report",
    "card",
    "headline",
    "measured",
    "read_overlays",
    "read_report",
    "table",
    "told",
    "write",
    "write_json",
    "write_page",
]
