"""Clocks that jump, and a disk that is slow."""

import itertools
import json
import os
import threading
import time
import types

import pytest
from faults import kit
from miniature import make_config, share_programs

from deeplab_jax import report, train
from deeplab_jax.train import train_and_evaluate
from deeplab_jax.training import writers

pytestmark = [pytest.mark.compiles, pytest.mark.xdist_group('alone')]
_rename = os.rename


@pytest.fixture(scope='module', autouse=True)
def programs():
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


def test_clocks_that_jump_spoil_no_speed(trained, tmp_path, monkeypatch):
  # A clock that is set, and a machine that sleeps for a day, as this package
  # sees them. Orbax counts its limits by the first, and gives up a save.
  wall = itertools.cycle([-86400.0, 0.0, 3e7, -1e9])
  slept = itertools.count(step=86400.0)
  clock = types.SimpleNamespace(
    time=lambda: time.time() + next(wall),
    time_ns=lambda: int(1e9 * clock.time()),
    monotonic=lambda: time.monotonic() + next(slept),
  )
  for module in (train, report, writers):
    monkeypatch.setattr(module, 'time', clock)
  config = make_config(trained.settings, data__eval_split='')
  with kit.limited(120):
    train_and_evaluate(config, tmp_path)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  assert [line['step'] for line in lines] == list(range(1, 7))
  assert all(line['images_per_second'] > 0 for line in lines)
  assert (tmp_path / 'report.html').exists()


def test_a_save_of_five_seconds_stops_no_step(trained, tmp_path, monkeypatch):
  """The disk takes its time when a checkpoint gets its name."""
  ends, steps = [], {}
  update = train.Progress.update

  def rename(source, target, **options):
    if os.path.basename(os.fspath(source)).startswith('4.orbax-checkpoint-tmp'):
      assert threading.current_thread() is not threading.main_thread()
      time.sleep(5)
      ends.append(time.monotonic())
    return _rename(source, target, **options)

  def noting(progress, step, values):
    steps[step] = time.monotonic()
    update(progress, step, values)

  monkeypatch.setattr(os, 'rename', rename)
  monkeypatch.setattr(train.Progress, 'update', noting)
  config = make_config(trained.settings, data__eval_split='')
  with kit.limited(120):
    train_and_evaluate(config, tmp_path)
  (end,) = ends
  assert steps[5] < end and steps[6] < end
