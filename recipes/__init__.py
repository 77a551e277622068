"""What is trained. Importing this package imports no torch."""

RECIPES = {
    "resnet": "recipes.resnet",
    "mnist": "recipes.mnist",
    "gpt": "recipes.gpt",
    "gan": "recipes.gan",
}
"""built-in names; `recipe=` also takes a file (./mine.py) or a dotted module"""
