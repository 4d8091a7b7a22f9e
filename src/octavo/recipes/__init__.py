"""Published systems rebuilt from Octavo's parts, each with a check of its claim: ``octavo reproduce NAME``."""

from octavo.recipes.base import Arm, Check, Finding, Recipe, Trial, get_recipe, recipe, recipes

__all__ = ["Arm", "Check", "Finding", "Recipe", "Trial", "get_recipe", "recipe", "recipes"]
