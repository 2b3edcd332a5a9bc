"""From a configuration to what it describes: the one bridge between them.

Folders take plain arguments; this file reads `config` and calls them.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from deeplab_jax import config as settings
from deeplab_jax.data.load import Dataset, load_dataset
from deeplab_jax.data.pipeline import make_train_iterator
from deeplab_jax.data.transforms import ColorJitter, RandomScaleCropFlip
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.evaluation.protocols import PROTOCOLS, Protocol
from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.errors import UserError, choose, naming, require
from deeplab_jax.training import losses, steps
from deeplab_jax.training.optimizers import make_optimizer, poly_schedule

log = logging.getLogger(__name__)

MEDIAN_FREQUENCY = ('median_frequency',)


def check(config: ConfigDict) -> None:
  """Makes all that needs no data, so that a wrong value is refused early.

  Raises:
    UserError: naming the section, the setting and its value.
  """
  make_model(config, num_classes=1)
  make_schedule_and_optimizer(config)
  _make_transforms(config, config.data.ignore_label)
  _make_protocol(config)
  loss, weights = config.loss, config.loss.class_weights or None
  with naming('config.loss'):
    choose('name', loss.name, losses.LOSSES)
    losses.check_settings(
      loss.label_smoothing,
      loss.hardest,
      None if weights == MEDIAN_FREQUENCY else weights,
    )


def open_dataset(config: ConfigDict, *splits: str) -> Dataset:
  """The data set of `config.data`, prepared, with at least these splits."""
  data = config.data
  return load_dataset(
    data.name,
    directory=data.dir,
    prepared_dir=data.prepared_dir,
    splits=tuple(dict.fromkeys(filter(None, splits))),
    ignore_label=data.ignore_label,
    label_map=data.label_map,
    on_bad_image=data.on_bad_image,
    options=_set(data.options),
  )


def make_model(config: ConfigDict, num_classes: int) -> DeepLabV3:
  """The network of `config.model`."""
  with naming('config.model'):
    return deeplab_v3(
      num_classes=num_classes,
      axis_name=AXIS_NAME if config.train.sync_bn else None,
      **_set(config.model),
    )


def _set(section: ConfigDict) -> dict[str, Any]:
  """The settings of a section that have a value."""
  return {name: value for name, value in section.items() if value is not None}


def make_schedule_and_optimizer(
  config: ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """What `config.optimizer` describes, over `config.train.steps` steps."""
  optimizer = config.optimizer
  with naming('config.optimizer'):
    schedule = poly_schedule(
      optimizer.learning_rate,
      config.train.steps,
      power=optimizer.power,
      warmup_steps=optimizer.warmup_steps,
    )
    return schedule, make_optimizer(
      optimizer.name,
      schedule,
      momentum=optimizer.momentum,
      weight_decay=optimizer.weight_decay,
      head_multiplier=optimizer.head_multiplier,
      clip_norm=optimizer.clip_norm,
    )


def make_train_step(
  config: ConfigDict,
  model: Any,
  optimizer: optax.GradientTransformation,
  **of_data: Any,
) -> Callable[..., Any]:
  """The step as training takes it, see `steps.pmap_train_step`.

  What depends on the data, `ignore_label` and `class_weights`, is given.
  """
  return steps.pmap_train_step(
    model=model,
    optimizer=optimizer,
    freeze_bn=config.train.freeze_bn,
    loss=choose('loss', config.loss.name, losses.LOSSES),
    hardest=config.loss.hardest,
    label_smoothing=config.loss.label_smoothing,
    **of_data,
  )


def make_iterator(
  config: ConfigDict, dataset: Dataset, start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """This host's share of the training batches, from `start_step` on."""
  return make_train_iterator(
    dataset.source(config.data.train_split),
    _make_transforms(config, dataset.info.ignore_label),
    batch_size=config.train.batch_size,
    seed=config.seed,
    start_step=start_step,
    host=jax.process_index(),
    hosts=jax.process_count(),
    threads=config.data.threads,
    workers=config.data.workers,
  )


def _make_transforms(
  config: ConfigDict, ignore_label: int
) -> tuple[RandomScaleCropFlip, ColorJitter]:
  data = config.data
  with naming('config.data'):
    crop = RandomScaleCropFlip(
      data.crop_size, data.scale, data.flip, ignore_label=ignore_label
    )
  with naming('config.data.color_jitter'):
    strengths = 'must be brightness, contrast, saturation and hue'
    require(len(data.color_jitter) == 4, strengths, data.color_jitter)
    return crop, ColorJitter(*data.color_jitter)


def make_evaluator(
  model: DeepLabV3, dataset: Dataset, config: ConfigDict
) -> Evaluator:
  """The evaluator of `config.data.eval_split` that `config.eval` describes."""
  split = config.data.eval_split
  return Evaluator(
    model,
    dataset,
    split,
    _make_protocol(config),
    batch_size=config.eval.batch_size,
    buckets=config.eval.buckets,
    threads=config.data.threads,
  )


def _make_protocol(config: ConfigDict) -> Protocol:
  with naming('config.eval'):
    return choose('protocol', config.eval.protocol, PROTOCOLS)(
      crop_size=config.eval.crop_size,
      overlap=config.eval.overlap,
      scales=config.eval.scales,
      flip=config.eval.flip,
    )


def class_weights(
  config: ConfigDict, dataset: Dataset
) -> tuple[float, ...] | None:
  """The weights that `config.loss.class_weights` stands for."""
  weights, classes = config.loss.class_weights, dataset.info.classes
  if not weights:
    return None
  if weights == MEDIAN_FREQUENCY:
    tally = dataset.tally(config.data.train_split)
    weights = losses.median_frequency_weights(
      tally.class_pixels, tally.class_image_pixels
    ).tolist()
  if len(weights) != len(classes):
    raise UserError(
      f'config.loss.class_weights={",".join(map(str, weights))} has'
      f' {len(weights)} numbers, and {dataset.info.name} {len(classes)}'
      f' classes: {", ".join(classes)}'
    )
  pairs = zip(classes, weights, strict=True)
  shown = ', '.join(f'{name} {weight:.4g}' for name, weight in pairs)
  log.info('class weights: %s', shown)
  return tuple(map(float, weights))


def check_machine(
  config: ConfigDict,
  mode: str,
  *,
  memory: int | None,
  threads: int | None,
  hosts: int = 1,
) -> None:
  """Refuses what this machine cannot hold, by lower bounds on the need.

  `memory`, in bytes, and the `threads` of a process are what there is, None if
  unknown; `hosts` machines share each batch. Only what `mode` uses counts.
  """
  model, data = config.model, config.data
  train, evaluate = mode == 'train', mode == 'eval'
  evaluate |= train and bool(data.eval_split)
  if (train or evaluate) and threads and data.threads > threads:
    raise UserError(
      f'config.data.threads={data.threads}: a process has at most {threads}'
      ' threads on this machine'
    )
  last, features = 8 * round(64 * model.width), model.aspp_features
  kernels = 2 * last + len(model.aspp_rates) * features
  loaders = max(data.workers, 1) * max(data.threads, 1)
  crops = -(-config.train.batch_size // hosts) * math.prod(data.crop_size)
  whole = config.eval.protocol == 'whole'
  cell = features + (1 if whole else math.prod(config.eval.crop_size))
  needs = {
    # Kernels of the last block and the ASPP; a map that a rate does not leave.
    'model.width model.aspp_features': 36 * last * kernels,
    'model.aspp_rates': 2 * max(model.aspp_rates) ** 2,
    'model.multi_grid': 2 * max(model.multi_grid) ** 2,
    # Interpreters and stacks; a batch in each thread and one in the step.
    'data.workers data.threads': (data.workers * 2**26 + loaders * 2**15)
    * train,
    'train.batch_size data.crop_size data.workers data.threads': (
      4 * crops * (loaders + 1) * train
    ),
    'eval.batch_size eval.crop_size': (
      4 * cell * -(-config.eval.batch_size // hosts) * evaluate
    ),
  }
  flat, default = map(settings.flat, (config, settings.get_config()))
  for keys, need in needs.items():
    if memory is not None and need > memory:
      changed = [k for k in keys.split() if flat[k] != default[k]]
      named = [f'config.{k}={flat[k]}' for k in changed or keys.split()]
      raise UserError(
        f'{", ".join(named)} need at least {min(need, 10**300) / 1e9:.3g} GB,'
        f' and this machine has {memory / 1e9:.3g} GB of memory'
      )
