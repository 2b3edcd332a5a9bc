import contextlib
import os
import signal
import sys
import time
import types

import pytest

from deeplab_jax.benchmark import startup
from deeplab_jax.runtime.errors import UserError


def test_a_start_ends_with_the_first_step():
  program = (
    'import sys, time\n'
    "print('resnet', file=sys.stderr)\n"
    'time.sleep(0.3)\n'
    "print('step 1/9  loss 1', file=sys.stderr, flush=True)\n"
    'time.sleep(60)\n'
  )
  start = time.monotonic()
  seconds = startup.first_step_seconds(
    [sys.executable, '-c', program], dict(os.environ)
  )
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
    startup, 'time', types.SimpleNamespace(perf_counter=interrupted)
  )
  with pytest.raises(KeyboardInterrupt):
    startup.first_step_seconds(
      [sys.executable, '-c', program, str(place)], dict(os.environ)
    )
  with contextlib.suppress(ChildProcessError):  # its end was seen already
    assert os.waitpid(int(place.read_text()), 0)[1] == signal.SIGKILL


def test_a_start_that_fails_says_why():
  program = 'raise SystemExit("error: config.seed is wrong")'
  with pytest.raises(UserError, match=r'first step: config\.seed is wrong'):
    startup.first_step_seconds([sys.executable, '-c', program], {})
