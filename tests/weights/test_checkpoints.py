"""Checkpoints: which are kept, what they say, and damage."""

import json
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.checkpoints import (
  Checkpoints,
  check_same_architecture,
  describe,
)


class State(NamedTuple):
  step: Any
  params: Any
  batch_stats: Any


def make_state(step):
  values = np.arange(6, dtype=np.float32).reshape(2, 3) + step
  return State(
    np.asarray(step, np.int32), {'kernel': values}, {'mean': values[0]}
  )


def save(workdir, mious, start=1):
  """One checkpoint a value, as one run would; None is not evaluated."""
  with Checkpoints(workdir) as saved:
    for step, miou in enumerate(mious, start):
      metrics = {} if miou is None else {'metrics': {'miou': miou}}
      saved.save(make_state(step), {'note': f'step {step}', **metrics})
  return {int(path.name) for path in (workdir / 'checkpoints').iterdir()}


@pytest.mark.parametrize(
  'mious, kept, best',
  [
    ([0.1], {1}, 1),
    ([0.1, 0.3, 0.2, 0.25], {2, 4}, 2),
    ([0.3, 0.1, 0.2], {1, 3}, 1),
    ([0.1, 0.2, 0.3], {3}, 3),
    ([0.1, None], {1, 2}, 1),
    ([None, None], {2}, 2),
    ([None, 0.0], {2}, 2),
  ],
)
def test_latest_and_best_alone_are_kept(tmp_path, mious, kept, best):
  assert save(tmp_path, mious) == kept
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step == len(mious)
    assert saved.step_named('latest') == len(mious)
    assert saved.step_named('best') == best
    assert saved.step_named(str(best)) == best


def test_best_of_an_earlier_process_is_kept(tmp_path):
  save(tmp_path, [0.1, 0.4])
  assert save(tmp_path, [0.2, 0.3], start=3) == {2, 4}


def test_state_and_metadata_come_back_as_they_were(tmp_path):
  save(tmp_path, [0.5])
  with Checkpoints(tmp_path) as saved:
    state = saved.restore(1, make_state(0))
    variables = saved.restore_variables(1)
    metadata = saved.metadata(1)
  expected = make_state(1)
  assert int(state.step) == 1
  np.testing.assert_array_equal(
    state.params['kernel'], expected.params['kernel']
  )
  np.testing.assert_array_equal(
    variables['batch_stats']['mean'], expected.batch_stats['mean']
  )
  assert set(variables) == {'params', 'batch_stats'}
  assert metadata == {'note': 'step 1', 'metrics': {'miou': 0.5}}


def test_metrics_of_an_older_workdir_are_read_by_their_new_name(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(make_state(1), {'note': 'old', 'measures': {'miou': 0.5}})
    saved.wait()
    assert saved.metadata(1) == {'note': 'old', 'metrics': {'miou': 0.5}}


def test_saving_a_step_again_changes_nothing(tmp_path):
  save(tmp_path, [0.5])
  save(tmp_path, [0.9])
  with Checkpoints(tmp_path) as saved:
    assert saved.metadata(1)['metrics'] == {'miou': 0.5}


def test_unknown_step_is_named_beside_those_there_are(tmp_path):
  save(tmp_path, [0.3, 0.1, 0.2])
  with (
    Checkpoints(tmp_path) as saved,
    pytest.raises(UserError, match=r'eval\.step=2 is not in .*has 1, 3'),
  ):
    saved.step_named('2')


def test_empty_workdir_has_no_step(tmp_path):
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step is None
    with pytest.raises(UserError, match='no checkpoint in'):
      saved.step_named('best')


def damage_nothing_left(step):
  for path in list(step.iterdir()):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage_state_gone(step):
  shutil.rmtree(step / 'state')


def damage_values_gone(step):
  for path in (step / 'state').rglob('d/*'):
    path.unlink()


def damage_values_truncated(step):
  for path in (step / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_metadata_truncated(step):
  path = step / 'metadata' / 'metadata'
  path.write_bytes(path.read_bytes()[:5])


def damage_metrics_truncated(step):
  path = step / 'metrics' / 'metrics'
  path.write_bytes(b'{')


# Orbax leaves a future of its reader without an event loop.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
  'damage',
  [
    damage_nothing_left,
    damage_state_gone,
    damage_values_gone,
    damage_values_truncated,
    damage_metadata_truncated,
    damage_metrics_truncated,
  ],
)
def test_damaged_checkpoint_is_named(tmp_path, damage):
  save(tmp_path, [0.5, 0.4])
  step = tmp_path / 'checkpoints' / '2'
  damage(step)
  with pytest.raises(UserError) as error, Checkpoints(tmp_path) as saved:
    saved.metadata(2)
    saved.restore_variables(saved.step_named('latest'))
  named = step.parent if damage is damage_metrics_truncated else step
  assert str(named) in str(error.value)
  assert '\n' not in str(error.value)


def test_file_in_the_place_of_the_folder_is_named(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='checkpoints'):
    Checkpoints(tmp_path)


def test_interrupted_save_is_not_a_checkpoint(tmp_path):
  save(tmp_path, [0.5])
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '1', folder / '2.orbax-checkpoint-tmp')
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step == 1
    assert (folder / '2.orbax-checkpoint-tmp').exists()
    saved.remove_interrupted()
  assert [path.name for path in folder.iterdir()] == ['1']


MODEL = {
  'backbone': 'resnet18',
  'width': 0.5,
  'output_stride': 16,
  'multi_grid': [1, 2, 4],
  'aspp_features': 8,
  'aspp_rates': [6, 12, 18],
}
DATASET = {'classes': ['a', 'b'], 'name': 'x'}


@pytest.mark.parametrize(
  'changes, classes, words',
  [
    ({'backbone': 'resnet34'}, 'ab', 'backbone resnet18 there, resnet34 asked'),
    ({'width': 1.0}, 'ab', 'width 0.5 there, 1.0 asked for'),
    ({'aspp_features': 16}, 'ab', 'aspp_features 8 there, 16 asked for'),
    ({'aspp_rates': [6, 12, 24]}, 'ab', 'aspp_rates'),
    ({'multi_grid': [1, 1, 1]}, 'ab', 'multi_grid'),
    ({'preset': 'keras'}, 'ab', 'preset paper there, keras asked for'),
    ({}, 'abc', 'num_classes 2 there, 3 asked for'),
    ({}, 'ac', "class 'b' there, 'c' asked for"),
  ],
)
def test_another_architecture_is_named(changes, classes, words):
  asked = describe({**MODEL, **changes}, {'classes': list(classes)})
  with pytest.raises(UserError, match=words):
    check_same_architecture(describe(MODEL, DATASET), asked, 'w')


def test_settings_that_shape_no_variable_may_differ():
  asked = {**MODEL, 'output_stride': 8, 'aspp_rates': (6, 12, 18)}
  saved = json.loads(json.dumps(describe(MODEL, DATASET)))
  check_same_architecture(saved, describe(asked, DATASET), 'w')


@pytest.mark.parametrize('asked', [['a', 'b'], ['a']])
def test_run_that_trained_void_as_a_class_must_be_trained_again(asked):
  saved = describe(MODEL, {'classes': ['a', 'b'], 'ignore_label': 1})
  other = describe(MODEL, {'classes': asked, 'ignore_label': 255})
  with pytest.raises(
    UserError, match=r"void, 1, as the class 'b'; train again"
  ):
    check_same_architecture(saved, other, 'w')


plain = (
  st.none()
  | st.booleans()
  | st.integers(-(2**53), 2**53)
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(st.characters(exclude_categories=['Cs']))
)
json_values = st.recursive(
  plain,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=10,
)


@few
@given(json_values)
def test_any_json_comes_back_as_metadata(value):
  with tempfile.TemporaryDirectory() as workdir:
    with Checkpoints(workdir) as saved:
      saved.save(make_state(1), {'note': value})
      saved.wait()
    with Checkpoints(workdir) as saved:
      assert saved.metadata(1) == {'note': value}
