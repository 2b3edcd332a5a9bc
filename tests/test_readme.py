"""What the README says is so."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_three_lines_give_a_working_model():
  block = README.split('## Use it in three lines')[1]
  code = re.search(r'```python\n(.*?)```', block, re.DOTALL)[1]
  names = {}
  exec(code, names)
  assert names['logits'].shape == (1, 375, 500, 21)
