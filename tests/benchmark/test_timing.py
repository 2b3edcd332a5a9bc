import contextlib
import itertools
import os
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest

from deeplab_jax.benchmark import timing
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.xdist_group('alone')


def test_later_compilations_are_counted():
  sizes = itertools.count(1)
  twice = jax.jit(lambda x: 2 * x)
  result = timing.timed(lambda: twice(np.ones(next(sizes))), 3)
  assert result['calls'] == 3 and result['compilations'] == 4


@pytest.mark.parametrize(
  ('repeat', 'tick', 'calls'), [(None, 10, 3), (None, 0.25, 5), (2, 0.25, 2)]
)
def test_short_calls_are_timed_for_three_seconds(
  monkeypatch, repeat, tick, calls
):
  # The clock is read twice a call, and from the fourth on once before it.
  ticks = itertools.count()
  clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) * tick)
  monkeypatch.setattr(timing, 'time', clock)
  done = []
  result = timing.timed(lambda: done.append(0), repeat)
  assert result['calls'] == len(done) - 1 == calls
  assert result['seconds'] == tick


def test_a_start_ends_with_the_first_step():
  program = (
    'import sys, time\n'
    "print('resnet', file=sys.stderr)\n"
    'time.sleep(0.3)\n'
    "print('step 1/9  loss 1', file=sys.stderr, flush=True)\n"
    'time.sleep(60)\n'
  )
  start = time.monotonic()
  seconds = timing.first_step_seconds([sys.executable, '-c', program])
  assert 0.3 < seconds <= time.monotonic() - start < 30


def test_an_interrupted_start_leaves_nothing_running(tmp_path, monkeypatch):
  place = tmp_path / 'process'
  program = (
    'import os, pathlib, sys, time\n'
    'pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n'
    "print('step 1/9  loss 1', file=sys.stderr, flush=True)\n"
    'time.sleep(60)\n'
  )
  clock = iter([0.0])

  def interrupted():
    for now in clock:
      return now
    raise KeyboardInterrupt

  monkeypatch.setattr(
    timing, 'time', types.SimpleNamespace(perf_counter=interrupted)
  )
  with pytest.raises(KeyboardInterrupt):
    timing.first_step_seconds([sys.executable, '-c', program, str(place)])
  with contextlib.suppress(ChildProcessError):  # its end was seen already
    assert os.waitpid(int(place.read_text()), 0)[1] == signal.SIGKILL


def test_a_start_that_fails_says_why():
  program = 'raise SystemExit("error: config.seed is wrong")'
  with pytest.raises(UserError, match=r'first step: config\.seed is wrong'):
    timing.first_step_seconds([sys.executable, '-c', program])
