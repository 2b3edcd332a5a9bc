"""Fixtures that several test files share.

The suite runs on four simulated devices. Compiling takes most of its time, so
programs are optimised little and kept for all tests and their subprocesses.
"""

import gc
import os
import tempfile
import types

_CACHE = tempfile.TemporaryDirectory(
  prefix='deeplab_jax_programs_', ignore_cleanup_errors=True
)
os.environ['XLA_FLAGS'] = ' '.join(
  [
    '--xla_force_host_platform_device_count=4',
    '--xla_backend_optimization_level=0',
    '--xla_disable_hlo_passes=cse_barrier_expander',  # as `host.configure` does
    os.environ.get('XLA_FLAGS', ''),  # the last of two settings counts
  ]
)
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# Traces are many objects and little garbage: looking for it every few hundred
# takes a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)

# What reads the environment comes after it is set.
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from miniature import SETTINGS, make_config, write_voc_folder  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def programs_of_one_file():
  """Frees the compiled programs of each file.

  On a CPU a program maps memory several times, and Linux gives a process 65,530
  mappings: beyond, the next program crashes it.
  """
  yield
  jax.clear_caches()
  gc.collect()


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
      lambda key: model.init(key, jnp.zeros((1, 33, 33, 3)), train=False),
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
