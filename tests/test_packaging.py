"""What pyproject.toml and the files beside it say is so."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import deeplab_jax
from deeplab_jax import main

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
PROJECT = PYPROJECT['project']
PYTHONS = ['3.11', '3.12', '3.13']
# Packages that are imported under another name.
NAMES = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'cv2': 'opencv-python-headless',
  'jaxlib': 'jax',
  'orbax': 'orbax-checkpoint',
}


def test_version_is_the_same_everywhere():
  version = deeplab_jax.__version__
  assert importlib.metadata.version('deeplab_jax') == version
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {version}\n' in citation
  latest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
  assert latest[1] == version


def test_console_script_is_the_command():
  (script,) = importlib.metadata.entry_points(
    group='console_scripts', name='deeplab_jax'
  )
  assert script.load() is main.entry


def test_pythons_are_those_that_the_classifiers_and_the_readme_name():
  classifiers = '\n'.join(PROJECT['classifiers'])
  assert re.findall(r'Python :: (3\.\d+)', classifiers) == PYTHONS
  low, high = re.fullmatch(
    r'>=3\.(\d+)\.4,<3\.(\d+)', PROJECT['requires-python']
  ).groups()
  assert [f'3.{minor}' for minor in range(int(low), int(high))] == PYTHONS
  readme = (ROOT / 'README.md').read_text()
  assert f'Python {PYTHONS[0]} to {PYTHONS[-1]}' in readme
  image = re.search('FROM python:([^-]+)', (ROOT / 'Dockerfile').read_text())
  assert image[1] in PYTHONS


EXTRAS = 'tf', 'tiff', 'torch', 'hf', 'gcs', 'wandb', 'mlflow', 'onnx', 'serve'


def packages(*extras):
  """Dependencies by name; each has one lowest version, which CI installs."""
  lines = [
    *PROJECT['dependencies'],
    *(line for e in extras for line in PROJECT['optional-dependencies'][e]),
  ]
  matches = [re.fullmatch(r'([\w-]+)>=([\d.]+)', line) for line in lines]
  assert all(matches), lines
  return {match[1].replace('-', '_') for match in matches}


def test_package_declares_what_it_imports():
  imported = set()
  for file in (ROOT / 'deeplab_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        imported.update(alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        imported.add(node.module)
  tops = {name.partition('.')[0] for name in imported}
  tops -= {*sys.stdlib_module_names, 'deeplab_jax'}
  used = {NAMES.get(name, name).replace('-', '_') for name in tops}
  assert {'jax', 'tensorflow_datasets'} < used
  assert used <= packages(*EXTRAS)


def test_package_declares_nothing_that_it_does_not_use():
  sources = (ROOT / 'deeplab_jax').rglob('*.py')
  words = set(re.findall(r'\w+', ' '.join(s.read_text() for s in sources)))
  imports = {package.replace('-', '_'): n for n, package in NAMES.items()}
  declared = packages(*EXTRAS)
  unused = {p for p in declared if imports.get(p, p) not in words}
  assert unused <= {'manimgx_fonts', 'manimgx_fonts_cjk'}  # read as files


def test_test_extra_has_lowest_versions():
  assert {'pytest', 'pytest_xdist'} < packages('test')


def test_the_package_is_typed():
  assert (ROOT / 'deeplab_jax' / 'py.typed').exists()
  assert 'Typing :: Typed' in PROJECT['classifiers']
