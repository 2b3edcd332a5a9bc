"""Builds what a configuration describes.

The library folders take plain arguments; this file passes them what it reads
from `config`.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from deeplab_jax.config import flat, get_config, to_json
from deeplab_jax.data.folder_files import check_inside
from deeplab_jax.data.load import Dataset, load_dataset
from deeplab_jax.data.pipeline import Batches, make_train_iterator
from deeplab_jax.data.transforms import ColorJitter, RandomScaleCropFlip
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.evaluation.protocols import PROTOCOLS, Protocol
from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.runtime.errors import UserError, choose, naming
from deeplab_jax.training import losses, objective, steps
from deeplab_jax.training.optimizers import make_optimizer, poly_schedule
from deeplab_jax.training.writers import Writer, check_backends

log = logging.getLogger(__name__)

MEDIAN_FREQUENCY = ('median_frequency',)
# Settings that may differ between the hosts of a run.
_OF_A_HOST = ['data.dir', 'data.prepared_dir', 'data.threads', 'data.workers']


def check(config: ConfigDict) -> None:
  """Builds all that needs no data: a wrong value raises `UserError` early."""
  # The platform is a guess: JAX starts its devices after it found its peers.
  make_model(config, num_classes=1, platform='cpu')
  make_schedule_and_optimizer(config)
  _make_transforms(config, config.data.ignore_label)
  make_protocol(config)
  with naming('config.log'):
    check_backends(config.log.to)
  loss, weights = config.loss, config.loss.class_weights or None
  with naming('config.loss'):
    objective.check_settings(
      loss.terms,
      loss.label_smoothing,
      loss.hardest,
      (1.0,) if weights == MEDIAN_FREQUENCY else weights,
      loss.auxiliary,
    )


def check_links(config: ConfigDict) -> None:
  """Refuses links that lead out of `config.data.dir`, unless allowed."""
  if config.data.dir and not config.data.allow_outside:
    check_inside(config.data.dir)


def open_dataset(config: ConfigDict, *splits: str) -> Dataset:
  """Opens the data set of `config.data`, prepared, with these splits."""
  data = config.data
  check_links(config)
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


def make_model(
  config: ConfigDict, num_classes: int, platform: str | None = None
) -> DeepLabV3:
  """Builds the network of `config.model`, by default for JAX's devices."""
  # On CPUs memory is slow, so recomputing costs no time.
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  settings = {
    'axis_name': AXIS_NAME if config.train.sync_bn else None,
    'rematerialization': 'elementwise' if on_cpu else 'none',
    'auxiliary': config.loss.auxiliary > 0,
    **_set(config.model),
  }
  with naming('config.model'):
    return deeplab_v3(num_classes=num_classes, **settings)


def _set(section: ConfigDict) -> dict[str, Any]:
  """Returns the settings of a section that have a value."""
  return {name: value for name, value in section.items() if value is not None}


def make_schedule_and_optimizer(
  config: ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Builds what `config.optimizer` describes, over `config.train.steps`."""
  settings = config.optimizer.to_dict()
  of_schedule = ('learning_rate', 'power', 'warmup_steps')
  schedule = {name: settings.pop(name) for name in of_schedule}
  with naming('config.optimizer'):
    rate = poly_schedule(steps=config.train.steps, **schedule)
    return rate, make_optimizer(learning_rate=rate, **settings)


def make_train_step(
  config: ConfigDict,
  model: Any,
  optimizer: optax.GradientTransformation,
  **of_data: Any,
) -> Callable[..., Any]:
  """Maps the training step over all devices, see `steps.pmap_train_step`.

  `of_data` holds what depends on the data: `ignore_label`, `class_weights`.
  """
  return steps.pmap_train_step(
    model=model,
    optimizer=optimizer,
    freeze_bn=config.train.freeze_bn,
    accumulate=config.train.accumulate,
    terms=config.loss.terms,
    auxiliary=config.loss.auxiliary,
    hardest=config.loss.hardest,
    label_smoothing=config.loss.label_smoothing,
    **of_data,
  )


def make_iterator(
  config: ConfigDict, dataset: Dataset, start_step: int = 0
) -> Batches:
  """Yields this host's share of the training batches, from `start_step` on."""
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
    return crop, ColorJitter(data.color_jitter)


def make_evaluator(
  model: DeepLabV3, dataset: Dataset, config: ConfigDict
) -> Evaluator:
  """Builds the evaluator of `config.data.eval_split` from `config.eval`."""
  split = config.data.eval_split
  return Evaluator(
    model,
    dataset,
    split,
    make_protocol(config),
    batch_size=config.eval.batch_size,
    buckets=config.eval.buckets,
    threads=config.data.threads,
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
    return choose('protocol', config.eval.protocol, PROTOCOLS)(
      crop_size=config.eval.crop_size,
      overlap=config.eval.overlap,
      scales=config.eval.scales,
      flip=config.eval.flip,
    )


def class_weights(
  config: ConfigDict, dataset: Dataset
) -> tuple[float, ...] | None:
  """Returns the class weights that `config.loss.class_weights` means."""
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
  log.info('class weights: %s', ', '.join(f'{n} {w:.4g}' for n, w in pairs))
  return tuple(map(float, weights))


def check_machine(
  config: ConfigDict,
  mode: str,
  *,
  memory: int | None,
  threads: int | None,
  hosts: int = 1,
) -> None:
  """Refuses settings that need more than this machine has: memory, packages.

  The memory needed is a lower bound. `memory` is in bytes, `threads` the most
  that a process may have; None if unknown. The `hosts` share each batch.
  Settings that `mode` does not use are not checked.
  """
  model, data, evaluation = config.model, config.data, config.eval
  trains, whole = mode == 'train', evaluation.protocol == 'whole'
  with naming('config.log'):
    check_backends(config.log.to, starts=trains)
  scores = mode == 'eval' or (trains and data.eval_split != '')
  loaders = {'threads': scores or trains, 'workers': trains}
  for name in loaders:
    if loaders[name] and threads is not None and data[name] > threads:
      raise UserError(
        f'config.data.{name}={data[name]}: a process has at most {threads}'
        ' threads on this machine'
      )
  last = 8 * round(64 * model.width)
  kernels = 9 * last * (2 * last + len(model.aspp_rates) * model.aspp_features)
  reach = max(*model.aspp_rates, *model.multi_grid)
  # A batch in each thread that loads, and one in the step.
  held = max(data.workers, 1) * max(data.threads, 1) + 1
  batch = -(-config.train.batch_size // hosts) * math.prod(data.crop_size)
  loaded = trains * batch * held
  cell = model.aspp_features + (not whole) * math.prod(evaluation.crop_size)
  scored = -(-evaluation.batch_size // hosts) * cell
  needs = {  # in numbers of 4 bytes
    'model.width model.aspp_features': kernels,  # of the last block and ASPP
    'model.aspp_rates model.multi_grid': reach**2 // 2,  # a map they fit into
    'train.batch_size data.crop_size data.workers data.threads': loaded,
    'eval.batch_size eval.crop_size': scores * scored,
  }
  given, default = flat(config), flat(get_config())
  for keys, numbers in needs.items():
    if memory is not None and 4 * numbers > memory:
      changed = [k for k in keys.split() if given[k] != default[k]]
      named = [f'config.{k}={given[k]}' for k in changed or keys.split()]
      raise UserError(
        f'{", ".join(named)} need at least {min(numbers, 10**300) / 25e7:.3g}'
        f' GB, and this machine has {memory / 1e9:.3g} GB of memory'
      )


def check_batches(config: ConfigDict, before: dict[str, Any]) -> None:
  """Checks the batch on these devices; `before` are settings of the workdir."""
  for key, value in flat(to_json(config)).items():
    if key not in _OF_A_HOST:
      distributed.check_same(value, f'config.{key}')
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
