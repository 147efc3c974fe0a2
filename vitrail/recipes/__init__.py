"""Recipes: named, complete training configurations, a page of values each.

A recipe is a function of the dataset's facts, of what the user gave, and of the weights that the run starts from; it
returns settings with a reason each. What the user gave is never changed, and what depends on it follows it.

Read `engine.py` for how a configuration is built, and any page (`auto.py`, `digits.py`, …) for what it says.
"""

from vitrail.recipes.choices import Choice
from vitrail.recipes.engine import RECIPES, build_config, recipe_file
from vitrail.recipes.facts import DatasetFacts
from vitrail.recipes.idle import refuse_idle

__all__ = ["RECIPES", "Choice", "DatasetFacts", "build_config", "recipe_file", "refuse_idle"]
