"""What all studies share: bases, the lab, verdicts, results and pages."""

from octavo.recipes.frame.judging import Gap, Gate, Judged, Verdict, gap, rank_correlation, tally
from octavo.recipes.frame.lab import Lab
from octavo.recipes.frame.records import Arm
from octavo.recipes.frame.stored import Stored, quantized, through_file
from octavo.recipes.frame.study import STUDIES, Study, get_study, studies

__all__ = [
    "STUDIES", "Arm", "Gap", "Gate", "Judged", "Lab", "Stored", "Study", "Verdict", "gap", "get_study", "quantized",
    "rank_correlation", "studies", "tally", "through_file",
]  # fmt: skip
