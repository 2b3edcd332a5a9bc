"""Who is gone, who waits for whom, and what takes too long."""

import json
import os
import socket
import subprocess
import sys
import timeit
import types

import jax
import pytest

from deeplab_jax.runtime import watchdog

HOST = 'here'


@pytest.fixture
def clock(monkeypatch):
  """The time that the watch sees, in a list."""
  now = [1000.0]
  monkeypatch.setattr(
    watchdog,
    'time',
    types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None),
  )
  return now


@pytest.fixture
def watch(clock, tmp_path):
  """Process 0 of 3, in a run that has saved step 50."""
  (tmp_path / '50').mkdir()
  (tmp_path / '60.orbax-checkpoint-tmp').mkdir()
  watch = watchdog._Watch()
  watch.count, watch.host, watch.folder = 3, HOST, tmp_path
  watch.active, watch.step = True, 51
  watch.enter('step')
  for index in range(3):
    watch.beats[index] = [f'host{index}', 'step', 51, 1]
  return watch


def test_a_process_that_does_not_beat_is_gone(watch, clock):
  for _ in range(16):
    watch.judge_others()
    assert not watch.end
    clock[0] += 2
    watch.answered = clock[0]
    for index in (0, 1):
      watch.beats[index][3] += 1
  watch.judge_others()
  assert watch.end == [
    75,
    'process 2 of 3 on host2 is gone; start all again, they go on from step 50',
  ]


def test_a_service_that_is_silent_means_process_0_and_no_other(watch, clock):
  for _ in range(16):
    watch.judge_others()
    assert not watch.end
    clock[0] += 2
  watch.judge_others()
  assert (
    watch.end[0] == 75 and 'process 0 of 3 on host0 is gone' in watch.end[1]
  )


def test_one_that_is_done_is_not_missed_and_one_that_failed_ends_all(
  watch, clock
):
  watch.beats[1][1] = 'done'
  for _ in range(40):
    clock[0] += 2
    watch.answered = clock[0]
    watch.beats[0][3] += 1
    watch.beats[2][3] += 1
    watch.judge_others()
  assert not watch.end
  watch.beats[2][1] = 'failed'
  watch.judge_others()
  assert watch.end[0] == 1
  assert watch.end[1].startswith('process 2 of 3 on host2 ended with an error')


def test_who_is_done_and_waits_for_the_others_ends_when_they_are_gone(
  watch, clock, monkeypatch
):
  class Left(BaseException):
    pass

  def leave():
    raise Left

  def second(_):  # in which process 1 alone beats
    clock[0] += 1
    watch.answered = clock[0]
    watch.beats[1][3] += 1

  monkeypatch.setattr(watchdog.time, 'sleep', second)
  watch.client, watch.active, watch.phase = object(), False, 'done'
  watch.beats[0][1], watch.leave = 'done', leave
  with pytest.raises(Left):
    watch.judge()
  assert (
    watch.end[0] == 75 and 'process 2 of 3 on host2 is gone' in watch.end[1]
  )
  assert clock[0] < 1000 + 40


def usual_steps(watch, clock):
  for _ in range(10):
    for phase, seconds in (('input', 0.1), ('step', 1)):
      watch.enter(phase)
      clock[0] += seconds
  watch.enter('input')


def test_a_slow_input_is_named_once(watch, clock, capsys):
  usual_steps(watch, clock)
  clock[0] += 59
  watch.judge_time()
  assert capsys.readouterr().err == ''
  clock[0] += 2
  watch.judge_time()
  watch.judge_time()
  assert capsys.readouterr().err == (
    'warning: here, step 51: input has taken 61 s, usually 0.1\n'
  )


def test_a_step_names_the_process_that_it_waits_for(watch, clock, capsys):
  usual_steps(watch, clock)
  watch.enter('device')
  clock[0] += 1
  watch.enter('step')
  watch.beats[1][1:3] = 'input', 50
  clock[0] += 70
  watch.judge_time()
  line = capsys.readouterr().err
  assert line.startswith('warning: here, step 51: step has taken 70 s')
  assert line.endswith('; waits for process 1 on host1, in its input\n')


def test_what_is_usually_slow_may_be_slow(watch, clock, capsys):
  for _ in range(3):
    watch.enter('save')
    clock[0] += 30
    watch.enter('step')
  watch.enter('save')
  clock[0] += 200
  watch.judge_time()
  assert capsys.readouterr().err == ''


def test_each_batch_of_an_evaluation_is_progress(watch, clock, monkeypatch):
  monkeypatch.setattr(watchdog, '_watch', watch)
  monkeypatch.setattr(watchdog.faulthandler, 'dump_traceback', lambda _: None)
  watch.limit = 60.0
  with watchdog.phase('evaluation'):
    for _ in range(10):
      clock[0] += 50
      watchdog.progress()
      watch.judge_time()
    assert not watch.end and watch.step == 51
    clock[0] += 61
    watch.judge_time()
  assert 'evaluation has taken 61 s' in watch.end[1]


def test_while_another_compiles_nobody_is_late(watch, clock, capsys):
  usual_steps(watch, clock)
  watch.limit = 60.0
  watch.beats[2][1] = 'compilation'
  clock[0] += 3000
  watch.judge_time()
  assert capsys.readouterr().err == '' and not watch.end


def test_beats_are_exchanged_through_the_service(watch, monkeypatch):
  stored = {'deeplab_jax/1': json.dumps(['there', 'input', 50, 7])}

  class Stop(BaseException):
    pass

  def stop(_):
    raise Stop

  def put(key, value, overwrite):
    stored[key] = value

  watch.client = types.SimpleNamespace(
    key_value_set=put, key_value_dir_get=lambda prefix: list(stored.items())
  )
  monkeypatch.setattr(watchdog.time, 'sleep', stop)
  with pytest.raises(Stop):
    watch.tell()
  assert watch.beats == {
    0: [HOST, 'step', 51, 0],
    1: ['there', 'input', 50, 7],
  }


PROGRAM = """
import sys, time
from pathlib import Path
from deeplab_jax.runtime import watchdog
watchdog._EVERY = 0.1
with watchdog.watching(float(sys.argv[1]) / 60, Path('.'), 4):
  for step in (5, 6):
    with watchdog.phase('input'):
      time.sleep(float(sys.argv[step - 3]))
    watchdog.progress(step)
"""


def run(limit, *inputs):
  return subprocess.run(
    [sys.executable, '-c', PROGRAM, *map(str, (limit, *inputs))],
    capture_output=True,
    text=True,
  )


def test_at_the_limit_the_stacks_are_shown_and_the_process_ends():
  done = run(1, 0, 60)
  assert done.returncode == 75
  *stacks, line = done.stderr.splitlines()
  assert 'step 5: input has taken 1 s, usually 0.0; start again' in line
  assert any('line' in stack and '<module>' in stack for stack in stacks)


def test_below_the_limit_nothing_is_said():
  done = run(3, 1, 1)
  assert (done.returncode, done.stderr) == (0, '')


def test_marks_cost_next_to_nothing(watch, monkeypatch):
  monkeypatch.undo()
  with watchdog.phase('test'):
    seconds = timeit.timeit(lambda: watchdog.progress(1), number=1000) / 1000
  assert seconds < 1e-4


PAIR = """
import os, sys, time
from absl import flags
from deeplab_jax.runtime import console, distributed
from deeplab_jax.runtime.errors import UserError
DEBUG = flags.DEFINE_bool('debug', False, 'Tracebacks.')
def main(argv):
  distributed.initialize()
  print('joined', flush=True)
  if argv[1] == os.environ['JAX_PROCESS_ID']:
    raise UserError('no such file')
  time.sleep(float(argv[2]))
console.run(main, DEBUG)
"""


@pytest.fixture
def pair():
  """Function (who fails, seconds) -> two joined processes."""
  started = []

  def start(who, seconds):
    with socket.socket() as server:
      server.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{server.getsockname()[1]}'
    for index in range(2):
      environment = os.environ | {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(index),
        'TF_CPP_MIN_LOG_LEVEL': '3',
      }
      started.append(
        subprocess.Popen(
          [sys.executable, '-c', PAIR, who, str(seconds)],
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return started

  yield start
  for process in started:
    process.kill()
    process.communicate()


def said(process, seconds):
  """What a process has printed after its first line, of where it meets."""
  output, errors = process.communicate(timeout=seconds)
  first, _, rest = errors.partition('\n')
  assert 'meets the others at 127.0.0.1:' in first
  return output, rest


def test_two_processes_that_end_well_say_nothing(pair):
  for process in pair('none', 1):
    assert said(process, 100) == ('joined\n', '')
    assert process.returncode == 0


@pytest.mark.parametrize('who', [0, 1])
def test_an_error_of_one_process_ends_the_other_with_one_line(pair, who):
  both = pair(str(who), 100)
  found = [said(process, 60)[1] for process in both]
  assert [process.returncode for process in both] == [1, 1]
  assert found[who] == 'error: no such file\n'
  assert found[1 - who].startswith(f'process {who} of 2 on ')
  assert found[1 - who].count('\n') == 1


def test_an_error_of_jax_is_raised_as_ever_in_one_process(monkeypatch):
  with pytest.raises(jax.errors.JaxRuntimeError), watchdog.leaving():
    raise jax.errors.JaxRuntimeError('no')
