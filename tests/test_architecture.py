"""The plan of the house: who may import whom, by folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deeplab_jax

ROOT = Path(deeplab_jax.__file__).parent
# Top-level files and the benchmark, from those that import to the imported.
ORDER = (
  ('main', 'benchmark', 'serve'),
  ('train', 'export', 'predict_files', 'publish'),
  ('evaluate', 'predict', 'prepare', 'report', 'compare'),
  ('import_weights',),
  ('build',),
  ('configure',),
  ('config',),
)
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
# What each folder may import, beside itself.
MAY_IMPORT = {
  'runtime': (),
  'ops': ('runtime',),
  'models': ('runtime', 'ops'),
  'data': ('runtime',),
  'weights': ('runtime', 'models'),
  'training': ('runtime', 'models'),
  'visualize': ('runtime', 'data'),
  'evaluation': ('runtime', 'models', 'data', 'visualize'),
}


def modules(root):
  """The imports of every module of a package, by its dotted name."""
  files = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).with_suffix('').parts
    name = '.'.join(part for part in parts if part != '__init__')
    files[name] = ast.parse(path.read_text())
  return {name: set(imports(tree, files)) for name, tree in files.items()}


def imports(tree, files):
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    for name in names:
      if name.partition('.')[0] == 'deeplab_jax':
        name = name.removeprefix('deeplab_jax').removeprefix('.')
        yield name if name in files else name.rpartition('.')[0]


def violations(root):
  """Every forbidden import in a package, as a line."""
  graph = modules(root)
  for name, imported in graph.items():
    folder = name.partition('.')[0]
    for other in imported - {name, ''}:
      target = other.partition('.')[0]
      if folder in MAY_IMPORT:
        allowed = target == folder or target in MAY_IMPORT[folder]
      else:  # a top-level file; the package itself gives the public names
        higher = LEVEL.get(target, len(ORDER)) > LEVEL.get(folder, -1)
        allowed = target in MAY_IMPORT or target == folder or higher
      if not allowed:
        yield f'{name} imports {other}'
  yield from (f'a circle: {" -> ".join(path)}' for path in circles(graph))


def circles(graph):
  done = set()

  def visit(name, path):
    if name in path:
      yield [*path[path.index(name) :], name]
    elif name not in done:
      for other in graph.get(name, ()):
        if other != name:
          yield from visit(other, [*path, name])
      done.add(name)

  for name in graph:
    yield from visit(name, [])


def test_every_import_follows_the_plan():
  assert list(violations(ROOT)) == []


@pytest.mark.parametrize(
  ('file', 'line', 'found'),
  [
    ('runtime/a', 'from deeplab_jax.ops import x', 'runtime.a imports ops'),
    ('ops/a', 'import deeplab_jax.models.b', 'ops.a imports models.b'),
    ('models/a', 'from deeplab_jax.data import b', 'models.a imports data'),
    ('data/a', 'from deeplab_jax.models import b', 'data.a imports models'),
    ('weights/a', 'from deeplab_jax.ops import x', 'weights.a imports ops'),
    ('training/a', 'import deeplab_jax.data.b', 'training.a imports data'),
    (
      'visualize/a',
      'import deeplab_jax.models.b',
      'visualize.a imports models',
    ),
    (
      'evaluation/a',
      'from deeplab_jax.training import b',
      'evaluation.a imports training',
    ),
    ('data/a', 'from deeplab_jax import config', 'data.a imports config'),
    ('config', 'from deeplab_jax import build', 'config imports build'),
    ('build', 'from deeplab_jax import train', 'build imports train'),
    ('predict', 'from deeplab_jax import main', 'predict imports main'),
    ('data/a', 'from deeplab_jax.data import b', 'a circle'),
  ],
)
def test_a_planted_import_is_found(file, line, found, tmp_path):
  root = tmp_path / 'deeplab_jax'
  for name in (*MAY_IMPORT, 'data/b', 'models/b', 'training/b', *LEVEL):
    path = root / (f'{name}/__init__' if name in MAY_IMPORT else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.py').write_text('')
  (root / 'data/b.py').write_text('import deeplab_jax.data.a')
  (root / f'{file}.py').write_text(line)
  assert any(text.startswith(found) for text in violations(root))


@pytest.mark.parametrize('module', ['deeplab_jax', 'deeplab_jax.train'])
def test_import_loads_no_other_framework(module):
  program = (
    f'import sys, {module}\n'
    "heavy = {'tensorflow', 'torch', 'keras', 'h5py', 'huggingface_hub',\n"
    "  'onnx', 'onnxruntime', 'fastapi', 'uvicorn', 'wandb', 'mlflow'}\n"
    'print(*heavy.intersection(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == []
