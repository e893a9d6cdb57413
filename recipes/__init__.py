"""One YAML file a product, what a recipe may say, and the one flow that runs it."""
