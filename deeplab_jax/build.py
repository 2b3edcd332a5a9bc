"""From a configuration to what it describes: the one bridge between them.

Files below take plain arguments; this one reads `config` and calls them.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from deeplab_jax.config import MEDIAN_FREQUENCY, parse_numbers
from deeplab_jax.data import transforms
from deeplab_jax.data.load import Dataset, load_dataset
from deeplab_jax.data.pipeline import make_train_iterator
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.training import steps
from deeplab_jax.training.losses import median_frequency_weights
from deeplab_jax.training.optimizers import make_optimizer, poly_schedule

log = logging.getLogger(__name__)


def open_dataset(config: ml_collections.ConfigDict, *splits: str) -> Dataset:
  """The data set of `config.data`, prepared, with at least these splits."""
  named = tuple(dict.fromkeys(filter(None, splits)))
  return load_dataset(**_dataset_arguments(config), splits=named)


def make_evaluator(
  model: DeepLabV3, dataset: Dataset, config: ml_collections.ConfigDict
) -> Evaluator:
  """The evaluator of `config.data.eval_split` that `config.eval` describes."""
  split = config.data.eval_split
  protocol = Protocol(
    config.eval.protocol,
    crop_size=tuple(config.eval.crop_size),
    overlap=config.eval.overlap,
    scales=tuple(config.eval.scales),
    flip=config.eval.flip,
  )
  return Evaluator(
    model,
    dataset.source(split),
    dataset.sizes(split),
    dataset.info,
    protocol,
    split=split,
    batch_size=config.eval.batch_size,
    buckets=config.eval.buckets,
    threads=config.data.threads,
  )


def _dataset_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What `load_dataset` takes, but for the splits."""
  data = config.data
  return {
    'name': data.name,
    'directory': data.dir,
    'prepared_dir': data.prepared_dir,
    'ignore_label': data.ignore_label,
    'label_map': data.label_map,
    'on_bad_image': data.on_bad_image,
    'options': {'list': data.list, 'holdout': data.holdout}
    if data.name == 'voc2012_segmentation/list'
    else {},
  }


def make_model(config: ml_collections.ConfigDict, num_classes: int) -> Any:
  """The network of `config.model` as training uses it."""
  axis_name = AXIS_NAME if config.train.sync_bn else None
  with naming('config.model'):
    return deeplab_v3(
      num_classes=num_classes, axis_name=axis_name, **config.model
    )


def make_schedule_and_optimizer(
  config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """What `config.optimizer` describes, over `config.train.steps` steps."""
  optimizer = config.optimizer
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
  config: ml_collections.ConfigDict,
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
    hardest=config.loss.hardest,
    label_smoothing=config.loss.label_smoothing,
    **of_data,
  )


def make_iterator(
  config: ml_collections.ConfigDict, dataset: Dataset, start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
  """This host's share of the training batches, from `start_step` on."""
  data = config.data
  return make_train_iterator(
    dataset.source(data.train_split),
    (
      transforms.RandomScaleCropFlip(
        data.crop_size,
        data.scale,
        data.flip,
        ignore_label=dataset.info.ignore_label,
      ),
      transforms.ColorJitter(data.color_jitter),
    ),
    batch_size=config.train.batch_size,
    seed=config.seed,
    start_step=start_step,
    host=jax.process_index(),
    hosts=jax.process_count(),
    threads=data.threads,
    workers=data.workers,
  )


def class_weights(
  config: ml_collections.ConfigDict, dataset: Dataset
) -> tuple[float, ...] | None:
  """The numbers that `config.loss.class_weights` stands for."""
  text, classes = config.loss.class_weights, dataset.info.classes
  if not text:
    return None
  if text == MEDIAN_FREQUENCY:
    tally = dataset.tally(config.data.train_split)
    weights = median_frequency_weights(
      tally.class_pixels, tally.class_image_pixels
    ).tolist()
  else:
    weights = parse_numbers(text)
  if len(weights) != len(classes):
    raise UserError(
      f'config.loss.class_weights={text} has {len(weights)} numbers, and'
      f' {dataset.info.name} {len(classes)} classes: {", ".join(classes)}'
    )
  pairs = zip(classes, weights, strict=True)
  shown = ', '.join(f'{name} {weight:.4g}' for name, weight in pairs)
  log.info('class weights: %s', shown)
  return tuple(weights)
