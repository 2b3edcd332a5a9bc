"""Damage in the newest of three checkpoints: noticed and named, or harmless."""

import logging
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from faults import kit

from deeplab_jax.weights.checkpoints import Checkpoints

NEWEST = 3


class State(NamedTuple):
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any


def make_state(step):
  """Arrays of several sizes; a bit that flips anywhere in them is seen."""
  rng = kit.generator(step)

  def array(*shape):
    return rng.normal(size=shape).astype(np.float32)

  layers = {f'conv{i}': {'kernel': array(3, 3, 8, 8 * i)} for i in (1, 2, 3)}
  moments = {name: {'kernel': array(3, 3, 8, 8)} for name in layers}
  return State(np.int32(step), layers, {'mean': array(64)}, moments)


def make_metadata(step):
  return {'model': {'width': 0.25}, 'note': 'x' * step}


def make_metrics(step):
  return {'miou': 0.1 * step, 'per_class_iou': {'a': None, 'ä': 1 / 3}}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'workdir'
  with Checkpoints(folder) as saved:
    for step in range(1, NEWEST + 1):
      saved.save(make_state(step), make_metadata(step))
      saved.add_metrics(step, make_metrics(step))
  return folder


def reopen(workdir):
  """What a run that goes on finds: step, state, metadata, the best step."""
  with Checkpoints(workdir) as saved:
    found, best = saved.open('latest'), saved.best_step
    assert saved.metrics(best) == make_metrics(best)
    return found.step, found.metadata, found.fill(make_state(0)), best


def same(found, expected):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )


def check(workdir, caplog, counts, kinds):
  files = kit.files_below(workdir / 'checkpoints' / str(NEWEST))
  sizes, wrong = np.array([path.stat().st_size for path in files]), []
  for case, kind in enumerate(kinds):
    rng = kit.generator(5, case)
    # Of two cases one is in any file, and one in any byte.
    share = sizes / sizes.sum() if case % 2 else None
    path, found = files[rng.choice(len(files), p=share)], []
    caplog.clear()
    with kit.restored(workdir), caplog.at_level(logging.WARNING):
      kit.damage(path, kind, rng)
      line = kit.refusal(lambda found=found: found.extend(reopen(workdir)))
    end = 'refused'
    if found:
      step, metadata, state, best = found
      as_saved = same(state, make_state(step))
      as_saved &= metadata == make_metadata(step)
      warned = [m for m in caplog.messages if f'{NEWEST}' in m]
      end = 'silently wrong'
      if as_saved and step == best == NEWEST:
        end = 'harmless'
      elif as_saved and (warned or path.name == 'evaluation.json'):
        # Without that file it is as if killed before its evaluation was over,
        # which training then makes up for.
        end = 'falls back'
    if end not in ('harmless', 'falls back'):
      wrong.append(f'{kind} of {path.relative_to(workdir)}: {end} {line or ""}')
    kit.count(counts, kind, end)
  assert not wrong, '\n'.join(wrong)


# Orbax leaves a future of its reader without an event loop.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def test_a_damaged_checkpoint_is_harmless_or_the_one_before_is_taken(
  workdir, caplog, counts
):
  kinds = ['flip'] * 8 + ['truncation', 'deletion', 'empty', 'zeros']
  check(workdir, caplog, counts, kinds)


@pytest.mark.slow
def test_300_flips_and_100_truncations_or_deletions_are(
  workdir, caplog, counts
):
  kinds = ['flip'] * 300 + ['truncation'] * 50 + ['deletion'] * 50
  check(workdir, caplog, counts, kinds)
