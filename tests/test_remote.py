"""Runs in Google Cloud Storage, here an emulator, equal those on a disk."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from faults import kit
from miniature import SETTINGS, as_options, write_voc_folder

gcs_server = pytest.importorskip('gcs_server')
pytestmark = pytest.mark.compiles


@pytest.fixture
def bucket(monkeypatch):
  with gcs_server.serving() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    pytest.importorskip('gcsfs')
    yield server


def run(workdir, *options):
  """The real command; returns what it prints."""
  command = [sys.executable, '-m', 'deeplab_jax.main', f'--workdir={workdir}']
  done = subprocess.run([*command, *options], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'damaged' not in done.stderr
  return done.stdout


@pytest.mark.slow
def test_a_run_in_a_bucket_that_was_killed_equals_one_on_a_disk(
  bucket, tmp_path, monkeypatch
):
  folder = write_voc_folder(tmp_path / 'mini', {'train': 6, 'val': 3})
  settings = {
    **SETTINGS,
    'train.steps': 12,
    'data.dir': folder,
    'data.prepared_dir': tmp_path / 'prepared',
  }
  options = as_options(settings)
  local, remote = tmp_path / 'run', 'gs://bucket/run'
  images = str(folder / 'JPEGImages')

  def names(start):
    return [name for name in list(bucket.objects) if name.startswith(start)]

  run(local, *options)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'gs://bucket/programs')
  killed = kit.Command(tmp_path / 'log', remote, options)
  in_save = 'bucket/run/checkpoints/4/state/d/'
  assert killed.wait_for(lambda: names(in_save))
  killed.end(signal.SIGKILL)
  run(remote, *options)
  for mode in ('eval',), ('predict', images), ('predict', images), ('report',):
    options = f'--mode={mode[0]}', *mode[1:]
    shown = run(remote, *options)
    assert shown == run(local, *options).replace(str(local), remote)

  assert names('bucket/programs/')

  def content(path):
    return bucket.objects[f'bucket/run/{path}'][0]

  for path in sorted(local.rglob('*')):
    name = path.relative_to(local).as_posix()
    if path.is_file() and not name.startswith(('checkpoints', 'tensorboard')):
      assert f'bucket/run/{name}' in bucket.objects
  for path in (local / 'predictions').iterdir():
    assert content(f'predictions/{path.name}') == path.read_bytes()
  table = content('eval/val_whole_confusion.csv')
  assert table == (local / 'eval/val_whole_confusion.csv').read_bytes()
  steps = [json.loads(x)['step'] for x in content('metrics.jsonl').splitlines()]
  assert sorted(set(steps)) == list(range(1, 13))
  states = []
  for workdir in local, remote:
    path = tmp_path / f'{len(states)}.npz'
    command = sys.executable, '-c', _READ, workdir, path
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    states.append(np.load(path))
  assert len(states[0].files) > 100
  for name in states[0].files:
    np.testing.assert_array_equal(*(state[name] for state in states), name)
  kept = {key.split('/')[3] for key in names('bucket/run/checkpoints/')}
  assert kept == {path.name for path in (local / 'checkpoints').iterdir()}


# In another process: TensorStore reads the environment once.
_READ = """
import sys, numpy as np
from deeplab_jax.predict import Predictor
from deeplab_jax.weights.checkpoints import Checkpoints
assert Predictor.from_workdir(sys.argv[1], step='latest').step == 12
with Checkpoints(sys.argv[1]) as saved:
  np.savez(sys.argv[2], **saved.open('latest').arrays)
"""
