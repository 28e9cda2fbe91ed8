"""Which way of fine-tuning to take: recipes, compared on classes that were left out."""

from pairclip.recipes.comparing import compare_recipes
from pairclip.recipes.comparison import RecipeComparison, RecipeResult
from pairclip.recipes.imprinting import imprint
from pairclip.recipes.recipe import Recipe, default_recipes
from pairclip.recipes.training import tune

__all__ = [
    "Recipe",
    "RecipeComparison",
    "RecipeResult",
    "compare_recipes",
    "default_recipes",
    "imprint",
    "tune",
]
