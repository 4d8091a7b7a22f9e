"""What a compression run did, for people: one offline page, a console table and a model card.

All three read the same plain dictionary, so that a report can be written again from the JSON
beside it.
"""

from octavo.report.page import write
from octavo.report.summary import card, headline, measured, table

__all__ = ["card", "headline", "measured", "table", "write"]
