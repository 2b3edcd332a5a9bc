"""The floors of the house: a file imports only from lower ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deeplab_jax

ROOT = Path(deeplab_jax.__file__).parent
# Below the floors.
BASE = {
  'lettering', 'models.convolutions', 'models.linear', 'data.images',
}  # fmt: skip
FLOORS = [
  {
    'download', 'host', 'signals', 'losses', 'metrics', 'optimizers',
    'checkpoints', 'distributed', 'writers', 'visualize', 'config',
    'profile', 'timing', 'models.layers',
    'data.datasets', 'data.transforms', 'data.records', 'data.labels',
    'weights.mapping', 'weights.files', 'confusion_picture', 'submission',
    'data.buckets', 'data.archives', 'data.voc_lists', 'data.voc_places',
  },
  {
    'models.resnet', 'models.aspp', 'models.padding', 'data.pipeline',
    'data.voc', 'data.shapes', 'data.folder', 'steps', 'protocols', 'samples',
    'weights.tf_slim', 'weights.keras', 'weights.timm', 'flops',
  },
  {'models.deeplab', 'data.load', 'data.survey', 'weights.load', 'scoring'},
  {'prepare', 'evaluate', 'predict', 'import_weights', 'options'},
  {'train', 'startup'},
  {'main', 'benchmark', 'measure'},
]  # fmt: skip
FLOOR = {name: number for number, row in enumerate(FLOORS) for name in row}
FLOOR |= dict.fromkeys(BASE, -1) | {
  'models.winograd': -2,
  'errors': -2,
  'disk': -2,
}
FILES = {
  '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
  for path in ROOT.rglob('*.py')
  if path.name != '__init__.py'
}


def imports(path):
  """Modules of this package that a file imports, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} imports relatively'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      for found in (name, name.rpartition('.')[0]):
        if found.removeprefix('deeplab_jax.') in FILES:
          yield found.removeprefix('deeplab_jax.')


def test_every_file_has_a_floor():
  assert set(FILES) <= set(FLOOR)


@pytest.mark.parametrize('name', sorted(FILES))
def test_file_imports_from_lower_floors_alone(name):
  part = name.partition('.')[0]
  for other in imports(FILES[name]):
    assert FLOOR[other] < FLOOR[name], f'{name} imports {other}'
    if {part, other.partition('.')[0]} <= {'models', 'data', 'weights'}:
      assert other.startswith(f'{part}.'), f'{name} imports {other}'
    if FLOOR[name] < 3:
      assert other != 'config', f'{name} reads the config'


@pytest.mark.parametrize('module', ['deeplab_jax', 'deeplab_jax.train'])
def test_import_loads_no_other_framework(module):
  program = (
    f'import sys, {module}\n'
    "heavy = {'tensorflow', 'torch', 'keras', 'h5py', 'huggingface_hub'}\n"
    'print(*heavy.intersection(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == []
