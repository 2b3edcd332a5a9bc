"""The measurements, each of which runs in a process of its own."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl.flags import FlagValues
from flax import linen as nn
from ml_collections import ConfigDict

from deeplab_jax import build, ops
from deeplab_jax.benchmark import timing
from deeplab_jax.config import get_config, validate
from deeplab_jax.configure import from_recipe, override
from deeplab_jax.data.load import Dataset
from deeplab_jax.data.pipeline import cores, load_example
from deeplab_jax.runtime import distributed, host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training import steps

_WINDOW = 256  # images that the input pipeline loads for one timing


def measure(options: FlagValues, settings: Sequence[str]) -> dict[str, Any]:
  """Measures `options.mode` with settings '--config...', in this process."""
  host.configure()
  (mode,), recipe, settings = options.mode, options.config, list(settings)
  if options.crop:
    settings.append(f'--config.data.crop_size=({options.crop},{options.crop})')
  if options.batch:
    for part in ('train', 'eval'):
      settings.append(f'--config.{part}.batch_size={options.batch}')
  about = {'mode': mode, 'jax': jax.__version__, 'cores': cores()}
  if mode == 'startup':
    settings += [f'--config={recipe}'] if recipe else []
    return about | timing.cold_and_warm(settings)
  config = from_recipe(recipe) if recipe else default_network()
  if rest := override(config, ['benchmark', *settings], list(options)):
    raise UserError(f'{rest[0]}: not an option')
  validate(config)
  build.check(config)
  result = MODES[mode](config, options)
  part = config.eval if mode == 'evaluation' else config.train
  about |= {
    'batch': part.batch_size,
    'backbone': config.model.backbone,
    'dtype': config.model.dtype,
    'device': jax.devices()[0].device_kind,
  }
  if mode != 'evaluation':  # its images have sizes of their own
    about['crop'] = list(config.data.crop_size)
  if mode != 'compile':
    result['images_per_second'] = part.batch_size / result['seconds']
  return about | result


def default_network() -> ConfigDict:
  """Settings without a recipe: ResNet-50, stride 16, crop 513, one a device."""
  config = get_config()
  config.model.update(
    backbone='resnet50', width=1.0, output_stride=16, aspp_features=256
  )
  config.data.crop_size = (513, 513)
  config.train.batch_size = config.eval.batch_size = jax.local_device_count()
  return config


def _network(config: ConfigDict, options: FlagValues) -> dict[str, Any]:
  """A forward pass on one device, or a training step on all.

  The utilization is the share of a matrix product's speed. XLA counts the
  operations of its own convolutions, without products by padding, and twice
  what is computed twice; the forms for CPUs need fewer.
  """
  training = options.mode == ['train']
  model, step, state = _create(config, options)
  batch = _batch(config, options.classes)
  if training:
    arguments = distributed.replicate(state), distributed.put(batch)
  else:
    step, arguments = _forward(config, model, state, batch)
  del state

  def call() -> Any:
    nonlocal arguments
    result = step(*arguments)
    if training:  # the step has consumed its state
      arguments = result[0], arguments[1]
    return result

  result = timing.timed(call, options.repeat)
  devices = result['devices'] = jax.local_device_count() if training else 1
  rate = timing.matmul_rate(config.model.dtype) * devices
  with ops.use('xla'):
    counted = step.lower(*arguments).cost_analysis()
  result['matmul_flops_per_second'] = rate
  result['flops'] = counted['flops'] * devices
  result['utilization'] = result['flops'] / result['seconds'] / rate
  if options.trace:
    with jax.profiler.trace(options.trace):
      jax.block_until_ready(call())
  return result


def _create(
  config: ConfigDict, options: FlagValues
) -> tuple[nn.Module, Any, steps.TrainState]:
  """The network, the step that training takes, and its first state."""
  devices, batch_size = jax.local_device_count(), config.train.batch_size
  if options.mode != ['forward'] and batch_size % devices:
    raise UserError(
      f'a batch of {batch_size} does not divide into the {devices} devices;'
      ' give another --batch'
    )
  model = build.make_model(config, options.classes)
  _, optimizer = build.make_schedule_and_optimizer(config)
  # The values of the weights make no difference to the time.
  weights = (1.0,) * options.classes if config.loss.class_weights else None
  step = build.make_train_step(config, model, optimizer, class_weights=weights)
  state = steps.create_state(model, optimizer, config.seed)
  return model, step, state.with_ema(config.train.ema is not None)


def _forward(
  config: ConfigDict, model: nn.Module, state: steps.TrainState, batch: Any
) -> tuple[Any, Any]:
  """The function from images to logits of evaluation, and its arguments."""
  variables = ops.cache_kernels(model, state.variables, config.data.crop_size)
  function = jax.jit(functools.partial(model.apply, train=False))
  return function, jax.device_put((variables, batch['image']))


def _batch(config: ConfigDict, classes: int) -> dict[str, np.ndarray]:
  """Random images and labels, as many as a batch of training."""
  rng, data = np.random.default_rng(config.seed), config.data
  shape = config.train.batch_size, *data.crop_size
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  label = rng.integers(0, classes, shape, np.uint8)
  return {'image': image, 'label': label, 'place': np.arange(shape[0])}


def _input(config: ConfigDict, options: FlagValues) -> dict[str, Any]:
  """Batches on the host, as training gets them; seconds are of a batch."""
  dataset = build.open_dataset(config, config.data.train_split)
  batches = -(-_WINDOW // config.train.batch_size)
  with contextlib.closing(build.make_iterator(config, dataset)) as iterator:

    def window() -> None:
      for _ in range(batches):
        next(iterator)

    result = timing.timed(window, options.repeat)
  seconds, parts = result['seconds'] / batches, _parts(config, dataset)
  return result | {'seconds': seconds, 'parts': parts}


def _parts(config: ConfigDict, dataset: Dataset) -> dict[str, float]:
  """Seconds of an image in a thread, of decoding and of each transform."""
  source, info = dataset.source(config.data.train_split), dataset.info
  of_data = info.num_classes, info.ignore_label, info.fill
  chain = build.make_transforms(config, *of_data)
  rng, times = np.random.default_rng(config.seed), []
  for number in range(_WINDOW + 1):  # the first one warms up
    times.append([time.perf_counter()])
    pair = load_example(source[number % len(source)])
    times[-1].append(time.perf_counter())
    for transform in chain:
      pair = transform(*pair, rng)
      times[-1].append(time.perf_counter())
  functions = [getattr(each, 'function', each) for each in chain]
  names = [getattr(f, '__name__', type(f).__name__) for f in functions]
  seconds = np.diff(times[1:]).mean(0).tolist()
  return dict(zip(['decode', *names], seconds, strict=True))


def _evaluation(config: ConfigDict, options: FlagValues) -> dict[str, Any]:
  """The evaluation split under random weights; seconds are of a batch."""
  split = config.data.eval_split
  dataset = build.open_dataset(config, split)
  model = build.make_model(config, dataset.info.num_classes)
  evaluator = build.make_evaluator(model, dataset, config)
  variables = steps.create_state(model, optax.identity(), config.seed).variables
  variables = ops.cache_kernels(model, variables, evaluator.view_size)
  variables = distributed.replicate(variables)
  call = functools.partial(evaluator.run, variables, keep=0)
  result = timing.timed(call, options.repeat)
  images = dataset.tally(split).num_images
  seconds = result['seconds'] * config.eval.batch_size / images
  return result | {'images': images, 'seconds': seconds}


def _compilation(config: ConfigDict, options: FlagValues) -> dict[str, Any]:
  """Tracing and compiling of both steps of `_network`, without the cache."""
  jax.config.update('jax_enable_compilation_cache', False)
  batch, seconds = _batch(config, options.classes), {}

  def part(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    seconds[f'{name}_seconds'] = time.perf_counter() - start
    return result

  model, step, state = part('create', _create, config, options)
  forward = part('cache_kernels', _forward, config, model, state, batch)
  train = step, (distributed.replicate(state), distributed.put(batch))
  for name, (function, arguments) in ('forward', forward), ('train', train):
    lowered = part(f'{name}_trace', function.lower, *arguments)
    part(f'{name}_compile', lowered.compile)
  return {**seconds, 'seconds': sum(seconds.values())}


MODES: dict[str, Callable[..., dict[str, Any]]] = {
  'forward': _network,
  'train': _network,
  'input': _input,
  'evaluation': _evaluation,
  'compile': _compilation,
  'startup': timing.cold_and_warm,
}
