"""Regimens: what acts while a model trains; one file a regimen, registered by decorator."""

from octavo.training.regimens.base import REGIMENS, HandOver, Regimen, regimen

__all__ = ["REGIMENS", "HandOver", "Regimen", "regimen"]
