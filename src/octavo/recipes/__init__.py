"""Published systems rebuilt from Octavo's parts, each with a check of its claim: ``octavo reproduce NAME``."""

from octavo.recipes.base import Arm, Check, Difference, Finding, Recipe, Trial, difference, get_recipe, recipe, recipes

__all__ = ["Arm", "Check", "Difference", "Finding", "Recipe", "Trial", "difference", "get_recipe", "recipe", "recipes"]
