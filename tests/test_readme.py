"""What the README says is so."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import miniature_voc
import numpy as np
import pytest
from miniature import as_options

from deeplab_jax.weights.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_tree_names_every_module():
  tree = README.split('## How it is built')[1]
  for group in re.findall(r'(\S*)\{(.*?)\}\.py', tree):
    tree += ' '.join(f' {group[0]}{name}.py' for name in group[1].split(','))
  modules = (ROOT / 'deeplab_jax').rglob('*.py')
  names = {str(path.relative_to(ROOT / 'deeplab_jax')) for path in modules}
  named = set(re.findall(r'[\w/]+\.py', tree))
  wanted = {name for name in names if not name.endswith('__init__.py')}
  assert wanted <= named
  assert {name for name in named if '/' in name} - {
    'tests/test_architecture.py'
  } <= wanted


def test_ci_runs_the_test_command_of_the_readme():
  command = "pip install -e '.[test]' && pytest"
  assert f'\n{command}\n' in README
  assert (
    command.replace('.[', r'.\[').replace(']', r'\]')
    in (ROOT / '.ci' / 'run').read_text()
  )


def run_in_miniature(command, places, settings):
  """Runs a command of the README from the project's folder."""
  for placeholder, place in places.items():
    command = command.replace(placeholder, str(place))
  program, *arguments = shlex.split(command)
  assert program == 'python'
  done = subprocess.run(
    [sys.executable, *arguments, *as_options(settings)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_two_commands_train_on_voc_in_two_stages(tmp_path):
  section = README.split('## Train on PASCAL VOC')[1].split('\n## ')[0]
  blocks = re.findall(r'```bash\n(.*?)\n```', section, re.DOTALL)
  first, second = (block.replace('\\\n', ' ') for block in blocks)
  data = tmp_path / 'data'
  miniature_voc.write_voc_devkit(data)
  miniature_voc.write_sbd(data)
  places = {
    'STAGE1_WORKDIR': tmp_path / 'stage1',
    'STAGE2_WORKDIR': tmp_path / 'stage2',
  }
  settings = {
    'data.dir': data,
    'data.prepared_dir': tmp_path / 'prepared',
    'data.crop_size': (65, 65),
    'data.threads': 2,
    'model.backbone': 'resnet18',
    'model.width': 0.125,
    'model.aspp_features': 8,
    'train.steps': 2,
    'train.batch_size': 4,
    'eval.batch_size': 4,
  }
  # The weights of ImageNet would be downloaded, for another network.
  run = run_in_miniature(first, places, {**settings, 'init_from': ''})
  assert f'{len(miniature_voc.TRAINAUG)} images' in run.stderr
  assert f'{len(miniature_voc.VOC_VAL)} images' in run.stdout
  run = run_in_miniature(second, places, settings)
  assert f'weights of {places["STAGE1_WORKDIR"]}' in run.stderr
  trainval = miniature_voc.VOC_TRAIN + miniature_voc.VOC_VAL
  assert f'{len(trainval)} images' in run.stderr
  assert 'not evaluated' in run.stdout
  one, two = (read_variables(place) for place in places.values())
  jax.tree.map(
    np.testing.assert_array_equal, two['batch_stats'], one['batch_stats']
  )
  moved = jax.tree.map(np.array_equal, two['params'], one['params'])
  assert not any(jax.tree.leaves(moved))


def read_variables(workdir):
  with Checkpoints(workdir) as saved:
    return saved.restore_variables(saved.step_named('best'))


@pytest.mark.slow
def test_three_lines_give_a_working_model():
  block = README.split('## Use it in three lines')[1]
  code = re.search(r'```python\n(.*?)```', block, re.DOTALL)[1]
  names = {}
  exec(code, names)
  assert names['logits'].shape == (1, 375, 500, 21)
