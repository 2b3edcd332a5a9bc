"""Two processes that train one network, and how a process finds the others."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from miniature import as_options, make_config

from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import held
from deeplab_jax.train import train_and_evaluate
from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = [pytest.mark.compiles, pytest.mark.xdist_group('alone')]


def test_shard_and_unshard_keep_the_order():
  batch = {'image': np.arange(24).reshape(8, 3)}
  devices = jax.local_device_count()
  sharded = distributed.shard(batch)
  assert sharded['image'].shape == (devices, 8 // devices, 3)
  np.testing.assert_array_equal(
    distributed.unshard(sharded)['image'], batch['image']
  )


def test_put_gives_each_device_its_share():
  batch = {'image': np.arange(24).reshape(8, 3)}
  image = distributed.put(batch)['image']
  np.testing.assert_array_equal(image, distributed.shard(batch)['image'])
  for share in image.addressable_shards:
    row = jax.local_devices().index(share.device)
    np.testing.assert_array_equal(share.data[0], batch['image'][2 * row :][:2])


def test_of_all_values_that_differ_the_first_is_named(monkeypatch):
  calls = []

  def gather(numbers):  # of two processes; the other one has another b and c
    calls.append(numbers)
    return np.array([numbers, numbers + np.array([0, 1, 1], np.int32)])

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', gather)
  with pytest.raises(UserError, match=r'^b must be the same .*; here 2$'):
    distributed.check_same({'a': 1, 'b': 2, 'c': 'x'})
  assert len(calls) == 1


def free_port():
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def start_process(index, address, options, output):
  environment = os.environ | {
    'JAX_COORDINATOR_ADDRESS': address,
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': str(index),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2'
    ' --xla_backend_optimization_level=0',
  }
  command = [sys.executable, '-m', 'deeplab_jax.main', *options]
  with output.open('w') as file:
    return subprocess.Popen(
      command, env=environment, stdout=file, stderr=subprocess.STDOUT
    )


@pytest.fixture
def start_both(trained, tmp_path):
  """Function (*options, **changes) -> two processes of one run, their logs."""
  started = []

  def start(*options, workdir='workdir', **changes):
    address = f'127.0.0.1:{free_port()}'
    options = [
      f'--workdir={tmp_path / workdir}',
      *options,
      *as_options(trained.settings | changes),
    ]
    logs = [tmp_path / f'{index}.log' for index in range(2)]
    pair = [start_process(i, address, options, logs[i]) for i in range(2)]
    started.extend(pair)
    return pair, logs

  yield start
  for process in started:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_both_processes_end_where_another_run_holds_the_workdir(
  start_both, tmp_path
):
  with held(tmp_path / 'workdir'):
    processes, logs = start_both()
    status = [process.wait(timeout=120) for process in processes]
  first, second = (log.read_text() for log in logs)
  assert status == [1, 1], first + second
  # Gloo may print a line after ours.
  assert first.count('error: ') == second.count('error: ') == 1
  assert f'workdir is in use by process {os.getpid()} on ' in first
  assert 'the first process cannot use it' in second


@pytest.mark.slow
def test_two_processes_train_what_one_process_trains(
  trained, start_both, tmp_path
):
  # Two steps: after four, a change of 6e-8 in the initial parameters of one
  # process may have become 1e-4, where a ReLU flips.
  changes = {'train.steps': 2, 'optimizer.warmup_steps': 0}
  processes, logs = start_both(**changes)
  status = [process.wait(timeout=300) for process in processes]
  first, second = (log.read_text() for log in logs)
  assert status == [0, 0], first + second
  assert 'mIoU' in first
  assert 'mIoU' not in second
  alone = tmp_path / 'alone'
  alone.mkdir()
  expected = train_and_evaluate(make_config(trained.settings | changes), alone)
  with (
    Checkpoints(tmp_path / 'workdir') as saved,
    Checkpoints(alone) as other,
  ):
    ours, theirs = (c.open(2).variables for c in (saved, other))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs
  )
  result = json.loads((tmp_path / 'workdir' / 'eval.json').read_text())
  assert result['images'] == expected['images']
  np.testing.assert_allclose(
    result['pixel_accuracy'], expected['pixel_accuracy'], atol=0.01
  )


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line['loss'] for line in map(json.loads, lines) if 'loss' in line]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_devices(
  trained, start_both, tmp_path, monkeypatch
):
  def both(*options, **named):
    processes, logs = start_both(*options, **named)
    status = [process.wait(timeout=300) for process in processes]
    assert status == [0, 0], [log.read_text() for log in logs]

  def one(devices, workdir, *options, **changes):
    flag = f'--xla_force_host_platform_device_count={devices}'
    monkeypatch.setenv(
      'XLA_FLAGS', f'{flag} --xla_backend_optimization_level=0'
    )
    command = [sys.executable, '-m', 'deeplab_jax.main', *options]
    command += as_options(trained.settings | changes)
    subprocess.run([*command, f'--workdir={tmp_path / workdir}'], check=True)

  two, three = (
    {'train.steps': steps, 'optimizer.warmup_steps': 0, 'train.keep': 9}
    for steps in (2, 3)
  )
  both(workdir='2x2', **two)
  one(4, '1x4', **two)
  one(1, '1x1', **two)
  first, *others = (losses(tmp_path / name) for name in ('2x2', '1x4', '1x1'))
  for other in others:
    np.testing.assert_allclose(first[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(first[1], other[1], rtol=1e-5)
  # Saved by two and resumed by one, and the reverse.
  shutil.copytree(tmp_path / '1x4', tmp_path / 'reverse')
  one(4, '2x2', **three)
  one(4, '1x4', **three)
  both(workdir='reverse', **three)
  last = [losses(tmp_path / name)[2] for name in ('2x2', '1x4', 'reverse')]
  np.testing.assert_allclose(last, last[1], rtol=1e-3)
  np.testing.assert_allclose(last[2], last[1], rtol=1e-5)
  # One checkpoint, evaluated by both and by one, on four devices and on one.
  start = tmp_path / '2x2' / 'eval'
  tables = [start / f'val_whole_step3_{x}.csv' for x in ('confusion', 'images')]
  options = '--mode=eval', '--config.eval.step=3', '--config.eval.boundary_iou'
  found = []
  for evaluate in (
    lambda: both(*options, workdir='2x2'),
    lambda: one(4, '2x2', *options),
    lambda: one(1, '2x2', *options),
  ):
    evaluate()
    found.append([table.read_bytes() for table in tables])
    for table in tables:
      table.unlink()
  assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_processes_with_other_settings_or_another_folder_are_refused(
  trained, tmp_path
):
  for settings, folders, words in (
    (('0.1', '0.5'), ('w', 'w'), 'config.optimizer.learning_rate must be the'),
    (('0.1', '0.1'), ('a', 'b'), 'some process sees another folder there'),
  ):
    address, logs = (
      f'127.0.0.1:{free_port()}',
      [tmp_path / 'l0', tmp_path / 'l1'],
    )
    pair = []
    for index in range(2):
      changes = {'optimizer.learning_rate': settings[index]}
      options = [f'--workdir={tmp_path / folders[index]}']
      options += as_options(trained.settings | changes)
      pair.append(start_process(index, address, options, logs[index]))
    assert [process.wait(timeout=200) for process in pair] == [1, 1]
    assert all(words in log.read_text() for log in logs)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(
  start_both, tmp_path
):
  changes = {'train.steps': 10_000, 'train.eval_every': 10_000}
  processes, logs = start_both(**changes)
  deadline = time.monotonic() + 300
  while 'step' not in logs[0].read_text() and time.monotonic() < deadline:
    time.sleep(0.5)
  processes[1].send_signal(signal.SIGTERM)
  status = [process.wait(timeout=300) for process in processes]
  texts = [log.read_text() for log in logs]
  assert status == [143, 143], texts
  with Checkpoints(tmp_path / 'workdir') as saved:
    step = saved.latest_step
  assert step > 0
  for text in texts:
    assert f'stopped at step {step};' in text


def wait_for(log, words):
  deadline = time.monotonic() + 300
  while words not in log.read_text() and time.monotonic() < deadline:
    time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('who', 'number'),
  [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_a_process_that_is_killed_or_stopped_ends_the_other(
  start_both, who, number
):
  processes, logs = start_both(**{'train.steps': 10_000, 'train.eval_every': 5})
  wait_for(logs[0], 'step 5: ')
  time.sleep(5)
  processes[who].send_signal(number)
  since = time.monotonic()
  assert processes[1 - who].wait(timeout=100) == 75, logs[1 - who].read_text()
  seconds = time.monotonic() - since
  text = logs[1 - who].read_text()
  print(f'{seconds:.0f} s: {text.splitlines()[-1]}')
  assert seconds < 60
  assert text.splitlines()[-1].startswith(f'process {who} of 2 on ')
  assert 'is gone; start all again, they go on from step ' in text
  assert 'Traceback' not in text and '@ ' not in text


@pytest.mark.slow
def test_ten_starts_with_a_warm_cache(start_both, tmp_path):
  changes = {'train.steps': 1, 'optimizer.warmup_steps': 0}
  for _ in range(11):  # the first one fills the cache
    processes, logs = start_both(**changes)
    status = [process.wait(timeout=300) for process in processes]
    assert status == [0, 0], [log.read_text() for log in logs]
    shutil.rmtree(tmp_path / 'workdir')
