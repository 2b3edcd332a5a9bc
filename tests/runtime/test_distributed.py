"""Two processes that train one network, and how a process finds the others."""

import json
import os
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


def test_alone_on_a_machine_nothing_is_joined(monkeypatch):
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  distributed.initialize()
  assert not jax.distributed.is_initialized()


def test_missing_process_number_is_named(monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '127.0.0.1:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('JAX_PROCESS_ID', 'first')
  with pytest.raises(UserError, match=r"JAX_PROCESS_ID must be .*'first'"):
    distributed.initialize()


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
  """Function (**changes) -> two processes of one run, and their logs."""
  started = []

  def start(**changes):
    address = f'127.0.0.1:{free_port()}'
    options = [
      f'--workdir={tmp_path / "workdir"}',
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
  first, second = (log.read_text().splitlines()[-1] for log in logs)
  assert status == [1, 1], first + second
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
    ours, theirs = (c.restore_variables(2) for c in (saved, other))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs
  )
  result = json.loads((tmp_path / 'workdir' / 'eval.json').read_text())
  assert result['images'] == expected['images']
  np.testing.assert_allclose(
    result['pixel_accuracy'], expected['pixel_accuracy'], atol=0.01
  )


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
