"""Recipes: named, complete training configurations, a page of values each.

A recipe is a function of facts about the dataset, of the settings that the user gave, and of the trained weights that the
run starts from, if any; it returns settings, each with its reason. What the user gave is never changed, and what depends
on it follows it.

`engine.py` builds a configuration from a recipe; each other page (`auto.py`, `digits.py`, …) is one recipe.
"""

from vitrail.recipes.choices import Choice
from vitrail.recipes.engine import RECIPES, build_config, recipe_file
from vitrail.recipes.facts import DatasetFacts
from vitrail.recipes.idle_settings import refuse_idle

__all__ = ["RECIPES", "Choice", "DatasetFacts", "build_config", "recipe_file", "refuse_idle"]
