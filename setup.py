"""The part of the build that pyproject.toml cannot say: the recipes.

In a wheel `experiments/NAME.py` is `deeplab_jax/experiments/NAME.py`, where
`--config=NAME` finds it. A clone keeps the folder at its top level.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted(map(str, Path('experiments').glob('*.py')))


class BuildWithRecipes(build_py):
  """Copies the recipes into the package."""

  def run(self) -> None:
    """Builds the package; an editable install reads the clone instead."""
    super().run()
    if not self.editable_mode:
      target = str(Path(self.build_lib, 'deeplab_jax', 'experiments'))
      self.mkpath(target)
      for recipe in RECIPES:
        self.copy_file(recipe, target)

  def get_source_files(self) -> list[str]:
    """What a source distribution holds."""
    return [*super().get_source_files(), *RECIPES]


setup(cmdclass={'build_py': BuildWithRecipes})
