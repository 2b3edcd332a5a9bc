"""A disk that fills: one line, what was good stays, and the command goes on.

The disk is a small tmpfs, which only root may mount.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import as_options

pytestmark = [pytest.mark.slow, pytest.mark.compiles]


@pytest.fixture
def disk(tmp_path):
  """A small disk; `disk.resize('2m')` makes space, or takes it."""
  place = tmp_path / 'disk'
  place.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(place)]
  if not shutil.which('mount') or subprocess.run(mount).returncode:
    pytest.skip('no tmpfs can be mounted here')
  yield place
  subprocess.run(['umount', str(place)], check=True)


def resize(disk, size):
  options = ['-o', f'remount,size={size}']
  subprocess.run(['mount', *options, str(disk)], check=True)


def fill(disk, leave):
  """Fills the disk up to `leave` bytes."""
  state = os.statvfs(disk)
  size = state.f_bavail * state.f_frsize - leave
  (disk / 'filler').write_bytes(bytes(size))


def command(*arguments):
  done = subprocess.run(
    [sys.executable, '-m', 'deeplab_jax.main', *map(str, arguments)],
    env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert 'Traceback' not in done.stderr
  return done.returncode, done.stderr


def files(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and not path.name.endswith('.lock')
  }


def refused_then_done(disk, arguments, output, leave):
  """The command on a full disk leaves nothing new; with space it ends well."""
  before = files(output) if output.exists() else {}
  fill(disk, leave)
  status, errors = command(*arguments)
  said = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert status == 1 and len(said) == 1, errors
  assert str(disk) in said[0] and 'No space left' in said[0]
  assert (files(output) if output.exists() else {}) == before
  (disk / 'filler').unlink()
  status, errors = command(*arguments)
  assert status == 0, errors


def test_preparation(disk, trained, tmp_path):
  settings = {**trained.settings, 'data.prepared_dir': str(disk / 'prepared')}
  arguments = ['--mode=prepare', f'--workdir={tmp_path / "w"}']
  arguments += as_options(settings)
  refused_then_done(disk, arguments, disk / 'prepared', 2**16)


def test_predictions(disk, trained):
  output = disk / 'predictions'
  arguments = ['--mode=predict', f'--workdir={trained.workdir}']
  arguments += [f'--config.predict.output_dir={output}']
  arguments += [trained.folder / 'JPEGImages']
  fill(disk, 2**14)
  status, errors = command(*arguments)
  said = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert status == 1 and len(said) == 1 and 'No space left' in said[0], errors
  assert str(output) in said[0]
  assert not list(output.rglob('.*.tmp'))
  (disk / 'filler').unlink()
  status, errors = command(*arguments)
  assert status == 0, errors
  assert len(list(output.glob('*_overlay.png'))) == 9


def test_export(disk, trained):
  output = disk / 'export'
  arguments = ['--mode=export', f'--workdir={trained.workdir}']
  arguments += [f'--config.export.output_dir={output}']
  refused_then_done(disk, arguments, output, 2**14)


def test_logs(disk, trained, tmp_path):
  """The workdir is elsewhere; what is logged lies on the full disk."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  for name in ('tensorboard', 'panels'):
    (disk / name).mkdir()
    (workdir / name).symlink_to(disk / name)
  arguments = [f'--workdir={workdir}', *as_options(trained.settings)]
  arguments += ['--config.train.eval_every=6']
  fill(disk, 2**12)
  status, errors = command(*arguments)
  assert status == 0, errors
  said = [line for line in errors.splitlines() if 'cannot log' in line]
  assert 1 <= len(said) <= 2 and all('No space left' in x for x in said)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines][:3] == [1, 2, 3]


def test_saves(disk, trained):
  # The disk holds one checkpoint, and not two.
  workdir = disk / 'w'
  arguments = [f'--workdir={workdir}']
  arguments += as_options({**trained.settings, 'train.eval_every': 2})
  status, errors = command(*arguments, '--config.train.steps=2')
  assert status == 0, errors
  one = sum(len(data) for data in files(workdir / 'checkpoints').values())
  before = files(workdir / 'checkpoints')
  fill(disk, one // 2)
  status, errors = command(*arguments)
  *_, line = errors.splitlines()
  assert status == 1 and line.startswith('error: ')
  assert 'cannot be saved: No space left on device' in line
  assert len([x for x in errors.splitlines() if 'rror' in x]) == 1, errors
  assert files(workdir / 'checkpoints') == before
  (disk / 'filler').unlink()
  status, errors = command(*arguments)
  assert status == 0, errors
