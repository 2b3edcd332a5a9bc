"""Settings changed at random: one line that names what is wrong, or accepted.

What is accepted must build: the state is traced, which computes nothing.
"""

import json
import re
import time

import jax
import jax.numpy as jnp
import pytest
from faults import kit
from miniature import SETTINGS, make_config

from deeplab_jax import build, config, configure, main
from deeplab_jax.runtime.errors import UserError

VALUES = (
  *(None, True, 0, -1, 1, 2, 3.5, -0.5, 1e-30, 1e39, 2**31, 2**63, 10**400),
  *(
    float('nan'),
    float('inf'),
    '',
    ' ',
    'x',
    'Ünïcode \u202e\x00\n',
    'a' * 9999,
  ),
  *('1,2', '(', '-1', 'nan', '../..', '/dev/null', 'best', 'a.b'),
  *([], [1], [1, 2, 3, 4], [None], [[1, 2], [3]], ['x', 1], [1e400, -1]),
  *({}, {'a': 1}, {'steps': {'deep': [{}]}}),
)


def check(settings):
  """What the command does before it opens the data, and the first state."""
  made = settings()
  main._apply(['program'], made)
  model = build.make_model(config.with_preset(made, 'paper'), 3)
  _, optimizer = build.make_schedule_and_optimizer(made)

  def create():
    variables = model.init(
      jax.random.key(made.seed), jnp.zeros((1, 33, 33, 3)), train=False
    )
    return optimizer.init(variables['params'])

  assert len(jax.tree.leaves(jax.eval_shape(create))) > 10
  assert json.loads(json.dumps(config.to_json(made))) == config.to_json(made)


def mutated(saved, rng):
  """Changes one to three places of a saved configuration, in place."""
  for _ in range(rng.integers(1, 4)):
    section = saved
    while True:
      key = list(section)[rng.integers(len(section))]
      inner = section[key]
      if not isinstance(inner, dict) or not inner or rng.random() < 0.1:
        break
      section = inner
    kind = ('delete', 'rename', 'value')[rng.choice(3, p=(0.15, 0.15, 0.7))]
    value = section.pop(key) if kind != 'value' else None
    if kind == 'value':
      section[key] = VALUES[rng.integers(len(VALUES))]
    elif kind == 'rename':
      section[key[:-1] + 'Xü' * int(rng.integers(3))] = value
    if not section or not saved:
      return


def check_files(tmp_path, counts, cases):
  path = tmp_path / 'config.json'
  original = json.dumps(config.to_json(make_config(SETTINGS)))
  kinds = [*['values'] * len(kit.DAMAGE), *kit.DAMAGE]
  for case in range(cases):
    rng, kind = kit.generator(3, case), kinds[case % len(kinds)]
    path.write_text(original)
    if kind == 'values':
      mutated(saved := json.loads(original), rng)
      path.write_text(json.dumps(saved))
    else:
      kit.damage(path, kind, rng)
    note = f'case {case}, {kind}: {path.read_bytes()[:3000]!r}'
    try:
      line = kit.refusal(lambda: check(lambda: configure.from_json(path)))
    except Exception as error:
      raise AssertionError(note) from error
    assert not line or re.search(r'config\.|json', line), line
    kit.count(counts, f'config.json, {kind}', 'refused' if line else 'accepted')


def check_options(counts, cases):
  keys = list(config.flat(config.get_config()))
  for case in range(cases):
    rng = kit.generator(4, case)
    key = keys[rng.integers(len(keys))]
    key = (key, key + 'x', key.upper(), 'x.' + key)[
      rng.choice(4, p=(0.85, 0.05, 0.05, 0.05))
    ]
    value = VALUES[rng.integers(len(VALUES))]
    text = value if isinstance(value, str) else json.dumps(value)
    option = f'--config.{key}={text}'

    def settings(option=option):
      made = make_config(SETTINGS)
      configure.override(made, ['program', option])
      return made

    try:
      line = kit.refusal(lambda: check(settings))
    except Exception as error:
      raise AssertionError(f'case {case}: {option[:200]!r}') from error
    assert not line or 'config' in line, line
    kit.count(counts, 'options', 'refused' if line else 'accepted')


def test_a_changed_config_json_is_refused_in_one_line_or_builds(
  tmp_path, counts
):
  check_files(tmp_path, counts, 12)


def test_a_changed_option_is_refused_in_one_line_or_builds(counts):
  check_options(counts, 10)


@pytest.mark.slow
def test_200_changed_config_jsons_and_100_options_are(tmp_path, counts):
  check_files(tmp_path, counts, 200)
  check_options(counts, 100)


def test_the_judge_lets_no_other_error_pass():
  def fail(error):
    raise error

  assert kit.refusal(lambda: None) is None
  assert kit.refusal(lambda: fail(UserError('x: is odd'))) == 'x: is odd'
  with pytest.raises(KeyError):
    kit.refusal(lambda: fail(KeyError('x')))
  with pytest.raises(AssertionError):
    kit.refusal(lambda: fail(UserError('two\nlines')))
  with pytest.raises(kit.Hang):
    kit.refusal(lambda: time.sleep(9), seconds=0.1)
