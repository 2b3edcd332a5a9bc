"""Builds what a configuration describes.

The library folders take plain arguments; this file passes them what it reads
from `config`.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from deeplab_jax.config import flat, get_config, to_json, with_preset
from deeplab_jax.data import transforms
from deeplab_jax.data.folder_files import check_inside
from deeplab_jax.data.load import Dataset, load_dataset
from deeplab_jax.data.pipeline import Batches, make_train_iterator
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.evaluation.protocols import PROTOCOLS, Protocol
from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.errors import UserError, choose, naming, require
from deeplab_jax.training import losses, objective, optimizers, steps
from deeplab_jax.training.writers import Writer, check_backends

log = logging.getLogger(__name__)

# Class weights from the labels: powers of those of median frequency.
_BY_LABELS = {('median_frequency',): 1.0, ('sqrt_median_frequency',): 0.5}
# Settings that may differ between the hosts of a run.
_OF_A_HOST = ['data.dir', 'data.prepared_dir', 'data.threads', 'data.workers']


def check(config: ConfigDict) -> None:
  """Builds all that needs no data: a wrong value raises `UserError` early."""
  # The platform is a guess: JAX starts its devices after it found its peers.
  make_model(config, num_classes=1, platform='cpu')
  make_schedule_and_optimizer(config)
  make_transforms(config, num_classes=1, ignore_label=config.data.ignore_label)
  make_protocol(config)
  with naming('config.log'):
    check_backends(config.log.to)
  weights = config.loss.class_weights or None
  weights = (1.0,) if weights in _BY_LABELS else weights
  with naming('config.loss'):
    given = config.loss.to_dict() | {'class_weights': weights}
    objective.check_settings(**given)


def check_links(config: ConfigDict) -> None:
  """Refuses links that lead out of `config.data.dir`, unless allowed."""
  if config.data.dir and not config.data.allow_outside:
    check_inside(config.data.dir)


def open_dataset(config: ConfigDict, *splits: str) -> Dataset:
  """Opens the data set of `config.data`, prepared, with these splits."""
  data = config.data
  check_links(config)
  own = 'prepared_dir', 'ignore_label', 'label_map', 'on_bad_image', 'as_stored'
  return load_dataset(
    data.name,
    directory=data.dir,
    splits=tuple(dict.fromkeys(filter(None, splits))),
    options=set_values(data.options),
    **{key: data[key] for key in (*own, 'tile')},
  )


def make_model(
  config: ConfigDict,
  num_classes: int,
  platform: str | None = None,
  **of_data: Any,
) -> DeepLabV3:
  """Builds the network of `config.model`, by default for JAX's devices.

  `of_data` is `DatasetInfo.normalization`.
  """
  # On CPUs memory is slow, so recomputing costs no time.
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  settings = {
    'axis_name': AXIS_NAME if config.train.sync_bn else None,
    'rematerialization': 'elementwise' if on_cpu else 'none',
    'auxiliary': config.loss.auxiliary > 0,
    **set_values(config.model),
    **of_data,
  }
  with naming('config.model'):
    return deeplab_v3(num_classes=num_classes, **settings)


def set_values(section: ConfigDict) -> dict[str, Any]:
  """Returns the settings of a section that have a value."""
  return {name: value for name, value in section.items() if value is not None}


def make_schedule_and_optimizer(
  config: ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Builds what `config.optimizer` describes, over `config.train.steps`."""
  settings = config.optimizer.to_dict()
  of_optimizer = ('name', 'momentum', 'weight_decay', 'head_multiplier')
  own = {key: settings.pop(key) for key in (*of_optimizer, 'clip_norm')}
  with naming('config.optimizer'):
    name = settings.pop('schedule')
    rate = optimizers.make_schedule(name, steps=config.train.steps, **settings)
    return rate, optimizers.make_optimizer(learning_rate=rate, **own)


def make_train_step(
  config: ConfigDict,
  model: Any,
  optimizer: optax.GradientTransformation,
  **of_data: Any,
) -> Callable[..., Any]:
  """Maps the training step over all devices, see `steps.pmap_train_step`.

  `of_data` holds what depends on the data: `ignore_label`, `class_weights`.
  """
  names = 'freeze_bn', 'accumulate', 'ema', 'freeze', 'freeze_steps', 'dropout'
  of_loss = config.loss.to_dict()
  del of_loss['class_weights']  # what they mean depends on the data
  return steps.pmap_train_step(
    model=model,
    optimizer=optimizer,
    seed=config.seed,
    **{name: config.train[name] for name in names},
    **of_loss,
    **of_data,
  )


def make_iterator(
  config: ConfigDict, dataset: Dataset, start_step: int = 0, count: int = 0
) -> Batches:
  """Yields this host's share of the training batches, from `start_step` on.

  With a `count`, batches of so many: the images of all hosts in their order.
  """
  data, info, split = config.data, dataset.info, config.data.train_split
  shown = dataset.classes_shown(split) if data.class_sampling else ()
  return make_train_iterator(
    dataset.source(split),
    make_transforms(config, info.num_classes, info.ignore_label, info.fill),
    batch_size=count or config.train.batch_size,
    seed=config.seed,
    start_step=start_step,
    host=0 if count else jax.process_index(),
    hosts=1 if count else jax.process_count(),
    threads=data.threads,
    workers=0 if count else data.workers,
    class_sampling=data.class_sampling,
    shown=shown,
  )


def make_transforms(
  config: ConfigDict,
  num_classes: int,
  ignore_label: int,
  fill: np.ndarray = transforms.RGB_FILL,
) -> list[transforms.Transform]:
  """Builds what `config.data` does to training images, without what is off.

  `fill` is the color of padding, in the type and channels of the images.
  """
  data, void, color = config.data, ignore_label, tuple(fill.tolist())
  with naming('config.data'):
    is_rgb = len(fill) == 3 and fill.dtype == np.uint8
    jitter = data.color_jitter
    rule = 'color_jitter: saturation and hue are 0 for images that are not RGB'
    require(is_rgb or not any(jitter[2:]), f'{rule} of 8 bits', jitter)
    shape = data.crop_size, data.scale, data.flip, data.rotate
    crop = transforms.RandomScaleCropFlip(
      *(*shape, data.crop_max_share, void, color)
    )
    optional = (
      (transforms.ColorJitter(jitter), any(jitter)),
      (transforms.GaussianBlur(data.blur), data.blur),
      (transforms.GaussianNoise(data.noise), data.noise),
      (transforms.Cutout(data.cutout, color), data.cutout),
    )
    own = [transforms.OfRecipe(f, num_classes, void) for f in data.transforms]
  return [crop, *(transform for transform, used in optional if used), *own]


def make_evaluator(
  model: DeepLabV3, dataset: Dataset, config: ConfigDict
) -> Evaluator:
  """Builds the evaluator of `config.data.eval_split` from `config.eval`."""
  own = 'batch_size', 'buckets', 'boundary_iou'
  return Evaluator(
    model,
    dataset,
    config.data.eval_split,
    make_protocol(config),
    threads=config.data.threads,
    **{key: config.eval[key] for key in own},
  )


def make_writer(config: ConfigDict, workdir: Path, start_step: int) -> Writer:
  """Opens what `config.log.to` names, for a run that starts after a step."""
  if 'jsonl' not in config.log.to:
    log.warning(
      'config.log.to has no jsonl: the report will show neither curves nor time'
    )
  with naming('config.log'):
    settings = flat(to_json(config))
    return Writer(workdir, start_step, config.log.to, settings)


def make_protocol(config: ConfigDict) -> Protocol:
  """Builds the evaluation protocol of `config.eval`."""
  with naming('config.eval'):
    own = 'crop_size', 'overlap', 'scales', 'flip'
    make = choose('protocol', config.eval.protocol, PROTOCOLS)
    return make(**{key: config.eval[key] for key in own})


def class_weights(
  config: ConfigDict, dataset: Dataset
) -> tuple[float, ...] | None:
  """Returns the class weights that `config.loss.class_weights` means."""
  weights, classes = config.loss.class_weights, dataset.info.classes
  if not weights:
    return None
  if weights in _BY_LABELS:
    tally = dataset.tally(config.data.train_split)
    by_median = losses.median_frequency_weights(
      tally.class_pixels, tally.class_image_pixels
    )
    weights = (by_median ** _BY_LABELS[weights]).tolist()
  if len(weights) != len(classes):
    raise UserError(
      f'config.loss.class_weights={",".join(map(str, weights))} has'
      f' {len(weights)} numbers, and {dataset.info.name} {len(classes)}'
      f' classes: {", ".join(classes)}'
    )
  pairs = zip(classes, weights, strict=True)
  log.info('class weights: %s', ', '.join(f'{n} {w:.4g}' for n, w in pairs))
  return tuple(map(float, weights))


def check_batches(config: ConfigDict, before: dict[str, Any]) -> None:
  """Checks what training alone uses; `before` are settings of the workdir."""
  with naming('config.log'):
    check_backends(config.log.to, starts=True)
  given = flat(to_json(config)).items()
  distributed.check_same({'the number of settings': len(given)})
  distributed.check_same(
    {f'config.{k}': value for k, value in given if k not in _OF_A_HOST}
  )
  # Weights may bring their preset; this one has the names of all the others.
  if config.train.freeze:
    model = make_model(with_preset(config, 'seed'), num_classes=1)
    init = functools.partial(steps.draw_variables, model)
    params = jax.eval_shape(init, jax.random.key(0))['params']
    with naming('config.train'):
      optimizers.frozen_parameters(params, config.train.freeze)
  name, default = config.optimizer.schedule, flat(get_config())
  schedule = choose('schedule', name, optimizers.SCHEDULES)
  unused = {'power', 'milestones', 'milestone_factor'}
  for own in sorted(unused - inspect.signature(schedule).parameters.keys()):
    key, value = f'optimizer.{own}', config.optimizer[own]
    if value not in (default[key], before.get(key)):
      text = (
        f'config.{key}={value} has no effect with config.optimizer.schedule'
      )
      raise UserError(f'{text}={name}; leave it out')
  warmup, last = config.optimizer.warmup_steps, config.train.steps
  if warmup > last and warmup != before.get('optimizer.warmup_steps'):
    raise UserError(
      f'config.optimizer.warmup_steps={warmup} must be at most'
      f' config.train.steps={last}'
    )
  devices, batch_size = jax.device_count(), config.train.batch_size
  parts = config.train.accumulate
  if batch_size % (devices * parts):
    raise UserError(
      f'config.train.batch_size={batch_size} must be divisible by the'
      f' {devices} devices times config.train.accumulate={parts}'
    )
  batch_size //= parts  # that batch normalization sees
  per_norm = batch_size if config.train.sync_bn else batch_size // devices
  if per_norm == 1 and not config.train.freeze_bn:
    log.warning(
      'batch normalization sees one image at a time: that of the image pooling'
      ' gets one value per channel and yields only its bias; use a larger'
      ' config.train.batch_size or config.train.freeze_bn=True'
    )
