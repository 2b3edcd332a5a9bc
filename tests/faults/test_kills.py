"""Runs that are killed again and again end as if nothing had happened."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from faults import kit
from miniature import SETTINGS, as_options, write_voc_folder

from deeplab_jax.weights.checkpoints import Checkpoints

pytestmark = [
  pytest.mark.compiles,
  pytest.mark.xdist_group('alone'),
  pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads /proc'),
]
EVERY = 5  # steps between evaluations, with a checkpoint each
# The longest wait, in seconds, after a part of the run was seen to begin.
PARTS = {
  'import': 2.0,
  'preparation': 0.2,
  'compile': 1.5,
  'step': 0.03,
  'evaluation': 0.15,
  'save': 0.02,
}


class Chain:
  """One run that is started and killed until its last step."""

  def __init__(self, root, steps, workdir='workdir'):
    self.root, self.steps, self.workdir = root, steps, root / workdir
    self.folder, self.prepared, self.starts = root / 'mini', 0, 0
    if not self.folder.exists():
      write_voc_folder(self.folder, {'train': 6, 'val': 16})

  @property
  def options(self):
    settings = {
      **SETTINGS,
      'data.dir': self.folder,
      'data.prepared_dir': self.root / f'prepared{self.prepared}',
      'train.steps': self.steps,
      'train.eval_every': EVERY,
      'eval.buckets': 1,  # one program
    }
    return as_options(settings)

  def start(self, *options):
    self.starts += 1
    log = self.root / f'{self.workdir.name}{self.starts}.log'
    return kit.Command(log, self.workdir, [*self.options, *options])

  def finish(self):
    command = self.start()
    assert command.end() == 0, command.text

  def attempt(self, part, number, rng):
    """Starts, and sends a signal in a part; returns what it hit, or None.

    None means that the run ended before.
    """
    if part == 'preparation':
      self.prepared += 1  # another folder: prepared anew
    command = self.start()
    prepared = self.root / f'prepared{self.prepared}'
    seen = {
      'import': lambda: True,
      'preparation': lambda: list(prepared.rglob('.*.lock')),
      'compile': lambda: 'compiling' in command.text,
      'step': lambda: re.search(r'^step ', command.text, re.M),
      'evaluation': lambda: self._evaluates(command.text),
      'save': lambda: self._saves(command.text),
    }
    found = command.wait_for(seen[part])
    time.sleep(rng.uniform(0, PARTS[part]))
    running = command.process.poll() is None
    if number == signal.SIGTERM:
      status = command.end(number)
      assert status in (0, 143, -15), command.text
      return part if found and running and status else None
    if running:
      command.process.send_signal(number)
    status = command.end()
    assert status in (0, -number), command.text
    if not running or status == 0:
      return None
    if self._saves(command.text):
      return 'save'
    if self._evaluates(command.text):
      return 'evaluation'
    return part

  def _evaluates(self, text):
    """Whether the log ends between a step and the scores after it."""
    steps = re.findall(r'^step +(\d+)/', text, re.M)
    due = steps and int(steps[-1]) % EVERY == 0
    return due and f'\nstep {steps[-1]}:' not in text

  def _saves(self, text):
    """Whether a save is under way; what an earlier one left is removed."""
    folder = self.workdir / 'checkpoints'
    return 'compiling' in text and any(folder.glob('*.orbax-checkpoint-tmp*'))

  def result(self):
    """All that must be equal: parameters, lines, scores, names of files."""
    with Checkpoints(self.workdir) as saved:
      assert saved.latest_step == self.steps
      variables = saved.open(self.steps).variables
    lines = (self.workdir / 'metrics.jsonl').read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    for line in lines:
      line.pop('images_per_second', None)
    names = {
      path.relative_to(self.workdir).as_posix()
      for path in kit.files_below(self.workdir)
      if not path.name.startswith('events.') and 'ocdbt' not in str(path)
    }
    names = {name for name in names if not re.search(r'/d/\w+$', name)}
    scores = json.loads((self.workdir / 'eval.json').read_text())
    return variables, lines, scores, names


def assert_same(ours, theirs):
  (ours, *others), (theirs, *expected) = ours, theirs
  assert others == expected
  for key in ('params', 'batch_stats'):
    np.testing.assert_equal(ours[key], theirs[key])


def shared_memory():
  folder = Path('/dev/shm')
  return set(os.listdir(folder)) if folder.is_dir() else set()


def check_shared_memory(before):
  end = time.monotonic() + 20  # others may use it, too
  while left := shared_memory() - before:
    assert time.monotonic() < end, f'left in /dev/shm: {left}'
    time.sleep(0.5)


def run_chain(tmp_path, counts, steps, plan, seconds):
  """Kills as `plan` says: (part, signal, how often, whether it must be hit)."""
  deadline, memory = time.monotonic() + seconds, shared_memory()
  whole = Chain(tmp_path, steps, 'whole')
  whole.finish()
  expected, rng = whole.result(), kit.generator(6)
  chains = [Chain(tmp_path, steps, 'chain0')]
  todo = [entry for entry in plan for _ in range(entry[2])]
  todo = [todo[index] for index in rng.permutation(len(todo))]
  while todo:
    assert time.monotonic() < deadline, f'{len(todo)} kills left: {counts}'
    part, number, _, strict = todo[-1]
    hit = chains[-1].attempt(part, number, rng)
    name = signal.Signals(number).name
    if hit is None:  # it came to its end: another run
      assert_same(finished(chains[-1]), expected)
      chains.append(Chain(tmp_path, steps, f'chain{len(chains)}'))
      chains[-1].prepared = chains[-2].prepared
    else:
      kit.count(counts, name, hit)
    if hit == part or (hit and not strict):
      todo.pop()
  assert_same(finished(chains[-1]), expected)
  kit.count(counts, 'runs', f'ended as the unbroken one x{len(chains)}')
  check_shared_memory(memory)


def finished(chain):
  chain.finish()
  return chain.result()


KILL, TERM = signal.SIGKILL, signal.SIGTERM


def test_a_run_killed_three_times_ends_as_the_unbroken_one(tmp_path, counts):
  plan = [('step', KILL, 1, False), ('save', KILL, 1, False)]
  run_chain(tmp_path, counts, 10, [*plan, ('evaluation', TERM, 1, False)], 300)


@pytest.mark.slow
def test_a_run_killed_55_times_ends_as_the_unbroken_one(tmp_path, counts):
  plan = [
    ('import', KILL, 6, False),
    ('preparation', KILL, 6, False),
    ('compile', KILL, 6, False),
    ('step', KILL, 6, False),
    ('evaluation', KILL, 3, False),
    ('save', KILL, 3, False),
    ('import', TERM, 2, False),
    ('compile', TERM, 2, False),
    ('step', TERM, 4, False),
    ('evaluation', TERM, 2, False),
    ('save', KILL, 10, True),
    ('evaluation', KILL, 5, True),
  ]
  run_chain(tmp_path, counts, 200, plan, 600)


def children(pid):
  """The loader processes of a run."""
  tasks = Path(f'/proc/{pid}/task').glob('*/children')
  found = [int(child) for task in tasks for child in task.read_text().split()]
  names = {child: Path(f'/proc/{child}/cmdline').read_text() for child in found}
  return [child for child, name in names.items() if 'spawn_main' in name]


@pytest.mark.slow
def test_a_killed_loader_is_started_anew_or_stops_the_run_in_one_line(
  tmp_path,
):
  memory = shared_memory()
  chain = Chain(tmp_path, 30)
  command = chain.start('--config.data.workers=2')
  assert command.wait_for(lambda: re.search('^step +3/', command.text, re.M))
  os.kill(children(command.process.pid)[0], signal.SIGKILL)
  status = command.end()
  assert 'leaked' not in command.text
  if status:
    assert status == 1
    (line,) = re.findall('^error: .*', command.text, re.M)
    assert 'worker' in line or 'process' in line
    chain.finish()
  whole = Chain(tmp_path, 30, 'whole')
  whole.finish()
  assert_same(chain.result(), whole.result())
  check_shared_memory(memory)
