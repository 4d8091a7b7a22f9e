"""Reports of a compression run: one offline page, a console table and a model card.

All three use the same data, so a report can be written again from its JSON file.
"""

from octavo.report.page import write
from octavo.report.summary import card, headline, measured, table

__all__ = ["card", "headline", "measured", "table", "write"]
