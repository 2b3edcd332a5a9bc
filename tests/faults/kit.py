"""Damage by seed, and how what meets it ends: as it should, or a failed test.

A test counts its cases by their end in the fixture `counts`; `tests/conftest`
prints all counts at the end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from deeplab_jax.runtime.errors import UserError


class Hang(BaseException):
  """A case took too long; nothing that catches exceptions catches it."""


@contextlib.contextmanager
def limited(seconds):
  """Raises `Hang` in the main thread if the body takes longer."""

  def ring(*_):
    raise Hang(f'more than {seconds} s')

  before = signal.signal(signal.SIGALRM, ring)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def refusal(action, seconds=30):
  """Returns the one line that refuses what `action` was given, else None.

  Only what the command prints without a traceback passes.
  """
  try:
    with limited(seconds):
      action()
  except (UserError, OSError) as error:
    line = str(error)
    assert line.strip() and len(line.splitlines()) == 1, repr(line)
    return line
  return None


def _flip(data, rng):
  place, bit = rng.integers(len(data)), rng.integers(8)
  changed = data[place] ^ (1 << int(bit))
  return data[:place] + bytes([changed]) + data[place + 1 :]


def _zeros(data, rng):
  size = int(rng.integers(1, max(2, len(data) // 4)))
  start = int(rng.integers(max(1, len(data) - size)))
  return data[:start] + bytes(size) + data[start + size :]


DAMAGE = {
  'flip': _flip,
  'flips': lambda data, rng: _flip(_flip(_flip(data, rng), rng), rng),
  'truncation': lambda data, rng: data[: rng.integers(len(data))],
  'zeros': _zeros,
  'noise': lambda data, rng: rng.bytes(len(data)),
  'empty': lambda data, rng: b'',
}


def damage(path, kind, rng):
  """Writes a file anew with one kind of damage, or deletes it."""
  if kind == 'deletion':
    path.unlink()
  else:
    path.write_bytes(DAMAGE[kind](path.read_bytes(), rng))


@contextlib.contextmanager
def restored(folder):
  """Makes changes of a folder undone at the end; yields the folder."""
  kept = shutil.copytree(folder, folder.with_name(f'{folder.name}_kept'))
  try:
    yield folder
  finally:
    shutil.rmtree(folder)
    kept.rename(folder)


def files_below(folder):
  return sorted(path for path in Path(folder).rglob('*') if path.is_file())


def count(counts, kind, end):
  row = counts.setdefault(kind, {})
  row[end] = row.get(end, 0) + 1


class Command:
  """The real command, in a process group of its own, its texts in a file."""

  def __init__(self, log, workdir, options):
    self.log = Path(log)
    command = [sys.executable, '-m', 'deeplab_jax.main']
    with self.log.open('w') as file:
      self.process = subprocess.Popen(
        [*command, f'--workdir={workdir}', *options],
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        start_new_session=True,
      )

  @property
  def text(self):
    return self.log.read_text(errors='replace')

  def wait_for(self, condition, seconds=120):
    """Whether the condition came true before the process ended."""
    end = time.monotonic() + seconds
    while not (found := condition()) and self.process.poll() is None:
      if time.monotonic() > end:
        self.end(signal.SIGKILL)
        raise Hang(f'not seen in {seconds} s:\n{self.text}')
      time.sleep(0.002)
    return bool(found)

  def end(self, number=0, seconds=120):
    """Sends a signal, waits, and returns the status; nothing stays behind."""
    if number:
      self.process.send_signal(number)
    try:
      status = self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()
      raise Hang(f'no end after {seconds} s:\n{self.text}') from None
    assert 'Traceback' not in self.text, self.text
    deadline = time.monotonic() + 10
    while _alive(self.process.pid):
      assert time.monotonic() < deadline, 'orphans in the process group'
      time.sleep(0.05)
    return status


def _alive(group):
  """Whether a process of the group runs."""
  for path in Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):
      state, _, number = path.read_text().rsplit(')', 1)[1].split()[:3]
      if int(number) == group and state != 'Z':
        return True
  return False


def generator(*seed):
  """Random numbers of one case, whatever the others draw."""
  return np.random.default_rng(seed)
