"""Fixtures that several test files share, and what holds for every test.

The suite runs on four simulated devices. Compiling takes most of its time, so
programs are optimized little and kept for all tests, on all workers of
pytest-xdist, and for their subprocesses. The first process, which starts the
workers, sets their environment.
"""

import contextlib
import gc
import itertools
import multiprocessing.resource_tracker
import os
import tempfile
import threading
import time
import types
from pathlib import Path

if 'PYTEST_XDIST_WORKER' not in os.environ:
  _PROGRAMS = tempfile.TemporaryDirectory(
    prefix='deeplab_jax_programs_', ignore_cleanup_errors=True
  )
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      '--xla_force_host_platform_device_count=4',
      '--xla_backend_optimization_level=0',
      '--xla_disable_hlo_passes=cse_barrier_expander',  # of `runtime.host`
      os.environ.get('XLA_FLAGS', ''),  # the last of two settings counts
    ]
  )
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS.name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['HYPOTHESIS_STORAGE_DIRECTORY'] = _PROGRAMS.name
# Traces are many objects and little garbage: looking for it every few hundred
# takes a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)

# These read the environment when they are imported.
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from miniature import SETTINGS, make_config, write_voc_folder  # noqa: E402

ROOT = Path(__file__).parents[1]


def pytest_xdist_make_scheduler(config, log):
  """Gives each worker whole files, so that each compiles its programs once.

  Tests of one `xdist_group` stay together as well: a file may be divided by
  groups, and tests of several files that would disturb each other joined.
  """
  from xdist.scheduler import LoadGroupScheduling  # absent with -p no:xdist

  class Scheduling(LoadGroupScheduling):
    def _split_scope(self, nodeid):
      return super()._split_scope(nodeid).partition('::')[0]

  return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Starts with the files that compile; the short ones fill the gaps."""
  items.sort(key=lambda item: item.get_closest_marker('compiles') is None)


def pytest_terminal_summary(terminalreporter):
  """Prints how the cases of `tests/faults` ended, also those of workers."""
  reports = itertools.chain(*terminalreporter.stats.values())
  for report in reports:
    if getattr(report, 'when', '') == 'call':
      for kind, ends in dict(report.user_properties).get('counts', {}).items():
        text = ', '.join(f'{count} {end}' for end, count in ends.items())
        name = report.nodeid.partition('::')[2]
        terminalreporter.write_line(f'{name}  {kind}: {text}')


@pytest.fixture(autouse=True, scope='session')
def own_folders(tmp_path_factory):
  """Home and place of temporary files for all tests, which leave them empty."""
  root = tmp_path_factory.mktemp('own')
  home, temporary = root / 'home', root / 'tmp'
  home.mkdir()
  temporary.mkdir()
  # Loader processes would start it; it lives as long as the process.
  multiprocessing.resource_tracker.ensure_running()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HOME', str(home))
    patch.setenv('KERAS_HOME', str(root / 'keras'))  # written on import
    for kind in ('CACHE', 'STATE'):
      patch.setenv(f'XDG_{kind}_HOME', str(root / kind.lower()))
    patch.setenv('TMPDIR', str(temporary))
    patch.setattr(tempfile, 'tempdir', str(temporary))
    yield home, temporary


@pytest.fixture(autouse=True, scope='module')
def programs_and_files_of_one_file(own_folders):
  """Frees the compiled programs of each test file, which leaves no file.

  On a CPU a program maps memory several times, and Linux gives a process 65,530
  mappings: beyond, the next program crashes it.
  """
  before = _files(own_folders)
  yield
  jax.clear_caches()
  gc.collect()
  left = _files(own_folders) - before
  assert not left, f'left by this file: {sorted(map(str, left))}'


@pytest.fixture(autouse=True)
def nothing_left():
  """No test leaves a process, a thread or another folder or environment."""
  running, place = _running(), _place()
  yield
  end = time.monotonic() + 5  # some stop a moment after they were told to
  while left := _running() - running:
    assert time.monotonic() < end, f'left running: {sorted(left)}'
    time.sleep(0.05)
  assert _place() == place


def _files(folders):
  """What lies in the folders given and, where nobody edits it, the project."""
  found = {path for folder in folders for path in folder.iterdir()}
  if 'CI' in os.environ:
    found.update(ROOT.iterdir())
    for name in ('deeplab_jax', 'docs', 'experiments', 'tests'):
      found.update((ROOT / name).rglob('*'))
  return {
    path
    for path in found
    if '__pycache__' not in path.parts
    # TFDS leaves an empty folder for each set that it asks the web for.
    and not path.name.endswith('tfds')
  }


def _running():
  """Child processes, where Linux tells them, and threads that Python awaits."""
  found = {
    f'thread {thread.name}'
    for thread in threading.enumerate()
    if not thread.daemon
  }
  for task in Path('/proc/self/task').glob('*/children'):
    with contextlib.suppress(OSError):  # the thread has ended
      found.update(f'process {number}' for number in task.read_text().split())
  return found


def _place():
  """The environment and the folder that a process starts in."""
  own = {'PYTEST_CURRENT_TEST'}
  return {k: v for k, v in os.environ.items() if k not in own} | {
    'the folder': os.getcwd()
  }


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A run of 6 steps: folder, workdir, settings, config and the result.

  Its last class occurs in no label. Tests that change the workdir copy it.
  """
  # Imported here, so that tests of other modules need no driver.
  from deeplab_jax.train import train_and_evaluate

  root = tmp_path_factory.mktemp('trained')
  folder = write_voc_folder(root / 'mini', {'train': 6, 'val': 3})
  with (folder / 'classes.txt').open('a') as file:
    file.write('absent\n')
  settings = {
    **SETTINGS,
    'data.dir': str(folder),
    'data.prepared_dir': str(root / 'prepared'),
  }
  workdir = root / 'workdir'
  workdir.mkdir()
  config = make_config(settings)
  result = train_and_evaluate(config, workdir)
  return types.SimpleNamespace(
    folder=folder,
    workdir=workdir,
    settings=settings,
    config=config,
    result=result,
  )


@pytest.fixture
def voc_folder(tmp_path):
  """A miniature folder in VOC devkit layout: 6 + 3 images, 3 classes."""
  return write_voc_folder(tmp_path / 'mini', {'train': 6, 'val': 3})


@pytest.fixture(scope='session')
def random_variables():
  """Function (model, seed=0) -> its variables, filled at random by numpy.

  Scales and variances lie in 0.5..1.5, other statistics and biases near 0, and
  kernels keep the size of what they multiply: every parameter matters.
  """

  def make(model, seed=0):
    shapes = jax.eval_shape(
      lambda key: model.init(
        key,
        jnp.zeros((1, 33, 33, len(getattr(model, 'mean', 'RGB')))),
        train=False,
      ),
      jax.random.key(0),
    )
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
      if path[-1].key in ('scale', 'var'):
        values = rng.uniform(0.5, 1.5, leaf.shape)
      elif path[-1].key in ('bias', 'mean'):
        values = rng.normal(0, 0.1, leaf.shape)
      else:
        values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
      return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)

  return make
