"""What a budget counts, and what must be able to run the result: one file a target."""

from octavo.targets.base import TARGETS, Goal, Target, get_target, target, targets

__all__ = ["TARGETS", "Goal", "Target", "get_target", "target", "targets"]
