"""Checkpoints: which are kept, what they say, and damage."""

import json
import logging
import os
import shutil
import tempfile
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.runtime.errors import UserError, first_line
from deeplab_jax.weights import checkpoints
from deeplab_jax.weights.checkpoints import Checkpoints

# Orbax leaves a future of a reader that failed without an event loop.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


class State(NamedTuple):
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any = ()


def make_state(step):
  values = np.arange(600, dtype=np.float32).reshape(20, 30) + step
  return State(
    np.asarray(step, np.int32),
    {'kernel': values},
    {'mean': values[0]},
    ({'trace': -values}, None),
  )


def save(workdir, mious, start=1, **keep):
  """One checkpoint a value, as one run would; None is not evaluated."""
  with Checkpoints(workdir, **keep) as saved:
    for step, miou in enumerate(mious, start):
      saved.save(make_state(step), {'note': f'step {step}'})
      if miou is not None:
        saved.add_metrics(step, {'miou': miou})
  return {int(path.name) for path in (workdir / 'checkpoints').iterdir()}


def assert_equal(saved, step):
  """The state of a step is there, bit for bit."""
  assert saved.metadata == {'note': f'step {step}'}
  assert saved.step == step
  expected = make_state(step)
  np.testing.assert_equal(saved.variables['params'], expected.params)
  np.testing.assert_equal(saved.variables['batch_stats'], expected.batch_stats)
  filled = saved.fill(make_state(0))
  assert jax.tree.structure(filled) == jax.tree.structure(expected)
  np.testing.assert_equal(filled, expected)


@pytest.mark.parametrize(
  'mious, keep, kept, best',
  [
    ([0.1], {}, {1}, 1),
    ([0.1, 0.3, 0.2, 0.25], {'keep': 1}, {2, 4}, 2),
    ([0.3, 0.1, 0.2], {'keep': 1}, {1, 3}, 1),
    ([0.3, 0.1, 0.2, 0.1, 0.1], {}, {1, 3, 4, 5}, 1),
    ([0.1, 0.2, 0.3, 0.4, 0.5], {}, {3, 4, 5}, 5),
    ([0.1, None], {'keep': 1}, {1, 2}, 1),
    ([None, None], {'keep': 1}, {2}, 2),
    ([None, 0.0], {'keep': 1}, {2}, 2),
    ([0.1, 0.2, 0.3, 0.4, 0.5], {'keep': 1, 'keep_every': 2}, {2, 4, 5}, 5),
  ],
)
def test_latest_ones_the_best_and_every_kth_are_kept(
  tmp_path, mious, keep, kept, best
):
  # When a checkpoint is saved it is not evaluated yet: the best may be the one
  # before it until then.
  assert save(tmp_path, mious, **keep) - {best - 1} == kept - {best - 1}
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step == len(mious)
    assert saved.open('latest').step == len(mious)
    assert saved.best_step == saved.open('best').step == best
    assert saved.open(str(best)).step == best


def test_best_of_an_earlier_process_is_kept(tmp_path):
  save(tmp_path, [0.1, 0.4])
  kept = save(tmp_path, [0.2, 0.3, 0.1], start=3, keep=1)
  assert kept == {2, 5}


def test_state_and_metadata_come_back_as_they_were(tmp_path):
  save(tmp_path, [0.5])
  with Checkpoints(tmp_path) as saved:
    assert_equal(saved.open(1), 1)
    assert saved.metrics(1) == {'miou': 0.5}


def test_metrics_of_an_older_workdir_are_read_by_their_new_name(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(make_state(1), {'note': 'old', 'measures': {'miou': 0.5}})
    saved.wait()
    assert saved.metrics(1) == {'miou': 0.5}


def test_state_of_another_optimizer_is_refused(tmp_path):
  save(tmp_path, [0.5])
  with (
    Checkpoints(tmp_path) as saved,
    pytest.raises(UserError, match='another optimizer'),
  ):
    saved.open(1).fill(make_state(0)._replace(opt_state=()))


def test_only_a_head_that_is_missing_is_said_to_be_missing(tmp_path):
  head = {'auxiliary': {'kernel': np.zeros(3)}}
  state = make_state(1)._replace(params=head, opt_state=({'trace': head},))
  with Checkpoints(tmp_path) as saved:
    saved.save(state, {})
    saved.wait()
    found = saved.open(1)
    with pytest.raises(UserError, match=r'needs the config\.optimizer it'):
      found.fill(state._replace(opt_state=({'mu': head},)))
    with pytest.raises(
      UserError, match=r'needs the config\.loss\.auxiliary it'
    ):
      found.fill(make_state(0))


def test_saving_a_step_again_changes_nothing(tmp_path):
  save(tmp_path, [0.5])
  with Checkpoints(tmp_path) as saved:
    saved.save(make_state(1), {'note': 'again'})
    saved.wait()
    assert saved.open(1).metadata == {'note': 'step 1'}


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
  add = jax.jit(
    lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0
  )
  state = jax.device_put(make_state(1))
  with Checkpoints(tmp_path) as saved:
    saved.save(state, {'note': 'step 1'})
    for _ in range(3):
      state = add(state)
  with Checkpoints(tmp_path) as saved:
    assert_equal(saved.open(1), 1)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
  written, write = threading.Event(), Checkpoints._write
  monkeypatch.setattr(
    Checkpoints, '_write', lambda *a: (written.wait(9), write(*a))
  )
  events = []
  with Checkpoints(tmp_path) as saved:
    saved.save(make_state(1), {}, then=lambda: events.append('on disk'))
    assert saved.latest_step is None  # and nobody has waited
    events.append('step')
    written.set()
    saved.wait()
    assert saved.latest_step == 1
  assert events == ['step', 'on disk']


def test_unknown_step_is_named_beside_those_there_are(tmp_path):
  save(tmp_path, [0.3, 0.1])
  with (
    Checkpoints(tmp_path) as saved,
    pytest.raises(UserError, match=r'eval\.step=7 is not in .*has 1, 2'),
  ):
    saved.open('7')


def test_empty_workdir_has_no_step(tmp_path):
  with Checkpoints(tmp_path) as saved:
    assert saved.latest_step is None
    with pytest.raises(UserError, match='no checkpoint in'):
      saved.open('best')


def damage_nothing_left(step):
  for path in list(step.iterdir()):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage_file_in_its_place(step):
  shutil.rmtree(step)
  step.write_text('')


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


def damage_metadata_changed(step):
  path = step / 'metadata' / 'metadata'
  path.write_text(path.read_text().replace('"note"', '"mote"'))


def damage_checksums_gone(step):
  path = step / 'metadata' / 'metadata'
  saved = json.loads(path.read_text())
  del saved['checksums']
  path.write_text(json.dumps(saved))


DAMAGES = [
  damage_nothing_left,
  damage_file_in_its_place,
  damage_state_gone,
  damage_values_gone,
  damage_values_truncated,
  damage_metadata_truncated,
  damage_metadata_changed,
  damage_checksums_gone,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checkpoint_is_skipped_with_one_line(tmp_path, damage, caplog):
  save(tmp_path, [None, None, None])
  damage(tmp_path / 'checkpoints' / '3')
  with Checkpoints(tmp_path) as saved:
    for name in ('latest', 'best'):
      caplog.clear()
      assert saved.open(name).step == 2
      lines = [m for m in caplog.messages if 'it is skipped' in m]
      assert len(lines) == 1 and '\n' not in lines[0]
      assert str(tmp_path / 'checkpoints' / '3') in lines[0]
    with pytest.raises(UserError, match=r'3 is damaged.*another config\.eval'):
      saved.open(3)
    saved.set_aside(after=2)
    assert saved.steps == [1, 2]
  assert (tmp_path / 'checkpoints' / 'damaged-3').exists()


@pytest.mark.parametrize('damage', DAMAGES)
def test_without_any_other_checkpoint_damage_is_an_error(tmp_path, damage):
  save(tmp_path, [0.5])
  damage(tmp_path / 'checkpoints' / '1')
  with (
    Checkpoints(tmp_path) as saved,
    pytest.raises(UserError, match=r'1 is damaged: .*; remove .*') as error,
  ):
    saved.open('latest')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('content', ['', '{', '{"miou": 0.9}', '[]'])
def test_damaged_metrics_count_as_not_evaluated(tmp_path, content, caplog):
  save(tmp_path, [0.4, 0.5])
  (tmp_path / 'checkpoints' / '2' / 'evaluation.json').write_text(content)
  with Checkpoints(tmp_path) as saved:
    assert saved.best_step == saved.open('best').step == 1
    assert saved.metrics(2) is None
  assert len(caplog.messages) == 1
  assert 'evaluation.json is damaged' in caplog.messages[0]


def flips(folder, count, seed):
  """Flips one bit of one file at a time, in proportion to their sizes."""
  rng = np.random.default_rng(seed)
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  sizes = np.array([path.stat().st_size for path in files])
  for path in rng.choice(len(files), count, p=sizes / sizes.sum()):
    before = bytearray(files[path].read_bytes())
    after = before.copy()
    after[rng.integers(len(after))] ^= 1 << rng.integers(8)
    files[path].write_bytes(after)
    yield files[path]
    files[path].write_bytes(before)


def test_no_flipped_bit_is_read_without_a_word(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  save(tmp_path, [None, None])
  noticed = 0
  for path in flips(tmp_path / 'checkpoints' / '2', 40, seed=0):
    caplog.clear()
    with Checkpoints(tmp_path) as saved:
      found = saved.open('latest')
    if found.step == 1:
      noticed += 1
      assert 'it is skipped' in caplog.text, path
    assert_equal(found, found.step)
  assert noticed > 10


def test_file_in_the_place_of_the_folder_is_named(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(FileExistsError, match='checkpoints'):
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


def fails_to_write(saved, monkeypatch):
  def save(path, *_):
    (path.parent / f'{path.name}.orbax-checkpoint-tmp').mkdir()
    raise OSError(28, os.strerror(28))

  monkeypatch.setattr(saved._orbax, 'save', save)


def test_of_what_tensorstore_says_the_refusal_of_the_system_is_kept():
  said = 'RESOURCE_EXHAUSTED: Error writing "a" in OCDBT database: ' + 'x' * 900
  said += " [os_error_code='28' errno='ENOSPC']"
  assert first_line(ValueError(said)) == 'No space left on device'
  assert len(first_line(ValueError('word ' * 200))) <= 200


def test_save_that_fails_is_one_line_and_the_checkpoint_before_stays(
  tmp_path, monkeypatch
):
  save(tmp_path, [0.5])
  line = r'2 cannot be saved: .*No space left on device; .*goes on from'
  with pytest.raises(UserError, match=line), Checkpoints(tmp_path) as saved:
    fails_to_write(saved, monkeypatch)
    saved.save(make_state(2), {})
    with pytest.raises(UserError, match=line):
      saved.save(make_state(3), {})
  with Checkpoints(tmp_path) as saved:
    assert saved.steps == [1]
    assert_equal(saved.open('latest'), 1)
  assert len(list((tmp_path / 'checkpoints').iterdir())) == 1


def test_folder_renamed_to_another_step_is_not_believed(tmp_path, caplog):
  save(tmp_path, [None, None])
  folder = tmp_path / 'checkpoints'
  (folder / '2').rename(folder / '20')
  with Checkpoints(tmp_path) as saved:
    assert saved.open('latest').step == 1
  assert '20 is damaged: it holds step 2' in caplog.text


def test_checkpoint_that_a_run_removes_meanwhile_is_not_called_damaged(
  tmp_path, monkeypatch, caplog
):
  save(tmp_path, [None, None])
  read = Checkpoints._read

  def removed(saved, path):
    if path.name == '2':
      save(tmp_path, [None], start=3)
      shutil.rmtree(path)
    return read(saved, path)

  monkeypatch.setattr(Checkpoints, '_read', removed)
  with Checkpoints(tmp_path) as saved:
    assert saved.open('latest').step == 3
    with pytest.raises(UserError, match=r'eval\.step=2 is not in'):
      saved.open(2)
  assert not caplog.messages


@pytest.mark.parametrize('miou', ['x', float('nan'), 1.5])
def test_metrics_that_are_none_count_as_not_evaluated(tmp_path, miou, caplog):
  save(tmp_path, [0.4, 0.5])
  path = tmp_path / 'checkpoints' / '2' / 'evaluation.json'
  path.write_text(json.dumps(checkpoints._sealed({'miou': miou})))
  with Checkpoints(tmp_path) as saved:
    assert saved.best_step == 1
  assert 'evaluation.json is damaged' in caplog.text


def test_deleted_folder_is_noticed_at_the_next_save(tmp_path):
  with (
    pytest.raises(UserError, match='checkpoints'),
    Checkpoints(tmp_path) as saved,
  ):
    shutil.rmtree(tmp_path / 'checkpoints')
    saved.save(make_state(1), {})


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
      assert saved.open(1).metadata == {'note': value}
