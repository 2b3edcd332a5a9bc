"""A run as small as they get, and what tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from PIL import Image

from deeplab_jax import DeepLabV3, ResNetV2, build
from deeplab_jax import config as default_config
from deeplab_jax.evaluation import evaluator
from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.resnet import PreActBasicUnit
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.training import steps

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


needs_cpu = pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='elsewhere nothing is cached'
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


def one_device_step(**settings):
  """The training step over the first device alone."""
  return jax.pmap(
    functools.partial(steps.train_step, **settings),
    axis_name=AXIS_NAME,
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


CLASSES = 4


def make(*, sync_bn=True, rematerialization='none', dtype=jnp.float32):
  """A DeepLab of one unit a block: steps compile in seconds."""
  norm = functools.partial(
    nn.BatchNorm,
    momentum=0.9,
    axis_name=AXIS_NAME if sync_bn else None,
    dtype=dtype,
  )
  backbone = ResNetV2(
    (1, 1, 1, 1),
    PreActBasicUnit,
    multi_grid=(2,),
    width=0.125,
    rematerialization=rematerialization,
    norm=norm,
    dtype=dtype,
  )
  aspp = ASPP((6,), 8, norm=norm, dtype=dtype)
  return DeepLabV3(backbone, aspp, CLASSES, dtype=dtype)


def global_batch(count=8, seed=0):
  """Images whose labels hold void in very different amounts."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (count, 33, 49, 3), np.uint8)
  label = rng.integers(0, CLASSES, (count, 33, 49)).astype(np.uint8)
  for i in range(count):
    label[i, : 4 * i] = 255
  return {'image': image, 'label': label}


def shard_mapped(step, out_specs):
  """A step over all devices, whose batch has no device axis."""
  mesh = Mesh(np.array(jax.devices()), AXIS_NAME)
  rows = PartitionSpec(AXIS_NAME)
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(PartitionSpec(), rows),
      out_specs=out_specs,
      check_vma=False,
    )
  )


def share(patch, owner, name, key):
  """Lets all calls of a function with one `key` share the first result.

  Traced functions are such results: traced again, equal ones take seconds.
  """
  function, results = getattr(owner, name), {}

  def shared(*arguments, **named):
    k = key(*arguments, **named)
    if k not in results:
      results[k] = function(*arguments, **named)
    return results[k]

  patch.setattr(owner, name, shared)


def share_programs(patch):
  """Lets runs and evaluations of equal settings share their programs."""
  ignored = ('step', 'panels', 'worst_and_best', 'save_predictions')
  share(
    patch,
    build,
    'make_train_step',
    lambda config, model, _, **of_data: repr(
      (model, config.loss, config.optimizer, config.train, of_data)
    ),
  )
  share(
    patch,
    evaluator,
    'pmap_predict_step',
    lambda model, protocol, *, probabilities: repr(
      (model, protocol, probabilities)
    ),
  )
  share(
    patch,
    build,
    'make_evaluator',
    lambda model, dataset, config: repr(
      (
        model,
        {k: v for k, v in config.eval.items() if k not in ignored},
        config.data,
        dataset.info,
      )
    ),
  )
