"""Fixtures that several test files share.

The suite runs on four simulated devices. Compiling takes most of its time, so
programs are optimised little and kept for all tests and their subprocesses.
"""

import functools
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
    '--xla_disable_hlo_passes=cse_barrier_expander',  # as `host.prepare` does
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
from PIL import Image  # noqa: E402

from deeplab_jax import config as default_config  # noqa: E402
from deeplab_jax import steps  # noqa: E402

# A network and a run as small as they get.
SETTINGS = {
  'model.backbone': 'resnet18',
  'model.width': 0.125,
  'model.output_stride': 16,
  'model.aspp_features': 8,
  'data.name': 'folder',
  'data.crop_size': (33, 33),
  'train.steps': 6,
  'train.batch_size': 4,
  'train.log_every': 1,
  'train.eval_every': 2,
  'optimizer.learning_rate': 0.05,
  'optimizer.warmup_steps': 2,
  'eval.batch_size': 4,
}


@pytest.fixture(autouse=True, scope='module')
def programs_of_one_file():
  """Frees the compiled programs of each file.

  On a CPU a program maps memory several times, and Linux gives a process 65,530
  mappings: beyond, the next program crashes it.
  """
  yield
  jax.clear_caches()
  gc.collect()


needs_cpu = pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='elsewhere nothing is prepared'
)


def xla_conv(x, kernel, stride=1, rate=1):
  """The oracle of convolution, symmetrically padded."""
  pad = rate * (kernel.shape[0] // 2)
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(pad, pad)] * 2,
    rhs_dilation=(rate, rate),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


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


def one_device_step(**settings):
  """The training step over the first device alone."""
  return jax.pmap(
    functools.partial(steps.train_step, **settings),
    axis_name=steps.AXIS_NAME,
    in_axes=(None, 0),
    out_axes=(None, 0),
    devices=jax.devices()[:1],
  )


def make_config(settings, **changes):
  """The default with settings by dotted key, and `section__key=value`."""
  config = default_config.get_config()
  changes = {key.replace('__', '.'): value for key, value in changes.items()}
  config.update_from_flattened_dict({**settings, **changes})
  return config


def as_options(settings):
  """The same settings for the command line."""
  return [f'--config.{key}={value}' for key, value in settings.items()]


@pytest.fixture
def voc_folder(tmp_path):
  """A miniature folder in VOC devkit layout: 6 + 3 images, 3 classes."""
  return write_voc_folder(tmp_path / 'mini', {'train': 6, 'val': 3})


def write_voc_folder(root, counts, seed=0):
  """Writes JPEGs of differing sizes and palette PNGs of 0, 1, 2 and 255."""
  rng = np.random.default_rng(seed)
  for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
    (root / part).mkdir(parents=True)
  (root / 'classes.txt').write_text('ground\nleft\nright\n')
  for split, count in counts.items():
    names = [f'{split}_{index}' for index in range(count)]
    lists = root / 'ImageSets' / 'Segmentation'
    (lists / f'{split}.txt').write_text('\n'.join(names) + '\n')
    for name in names:
      height, width = rng.integers(40, 70, 2)
      image = rng.integers(0, 256, (height, width, 3), np.uint8)
      label = np.zeros((height, width), np.uint8)
      label[10:30, 5:20], label[10:30, 20:35], label[0] = 1, 2, 255
      Image.fromarray(image).save(root / 'JPEGImages' / f'{name}.jpg')
      indexed = Image.fromarray(label, 'P')
      # all 256 colours: with fewer, PIL would write too few bits for 255
      indexed.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0] + [7] * 759)
      indexed.save(root / 'SegmentationClass' / f'{name}.png')
  return root


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
