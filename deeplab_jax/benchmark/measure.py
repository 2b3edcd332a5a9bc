"""One measurement in this process: python -m deeplab_jax.measure --mode=MODE.

Prints one JSON line. `benchmark` runs it once a measurement, so that neither
their memory nor their compilations mix.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from flax import linen as nn

from deeplab_jax import build, evaluate, options
from deeplab_jax.benchmark import flops, profile, startup, timing
from deeplab_jax.config import from_recipe, get_config, validate
from deeplab_jax.data.pipeline import cores
from deeplab_jax.runtime import distributed, host
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training import steps

_WINDOW = 256  # images that the input pipeline loads for one timing
_LAYERS = 10


def forward(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Logits of full size from images that lie on one device.

  By prepared variables, as `--mode=eval` takes them.
  """
  model = build.make_model(config, args.classes)
  state = steps.create_state(model, optax.identity(), config.seed)
  apply = jax.jit(functools.partial(model.apply, train=False))
  variables = model.prepare(state.variables, tuple(config.data.crop_size))
  arguments = jax.device_put((variables, _batch(config, args)['image']))
  return _network(
    lambda: apply(*arguments),
    lambda: apply.lower(*arguments),
    flops.count_flops(model, config.data.crop_size, config.train.batch_size),
    config,
    args,
    devices=1,
  )


def train_step(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Loss, gradient and update, by the step that training takes."""
  model, optimizer, step = _training(config, args)
  state = distributed.replicate(
    steps.create_state(model, optimizer, config.seed)
  )
  batch = distributed.put(_batch(config, args))

  def call() -> Any:
    nonlocal state
    state, measures = step(state, batch)
    return state, measures

  return _network(
    call,
    lambda: step.lower(state, batch),
    flops.count_flops(model, config.data.crop_size, config.train.batch_size),
    config,
    args,
    devices=jax.local_device_count(),
  )


def _training(
  config: ml_collections.ConfigDict, args: Any
) -> tuple[nn.Module, optax.GradientTransformation, Callable[..., Any]]:
  """Network, optimizer and the step that training takes."""
  devices = jax.local_device_count()
  if config.train.batch_size % devices:
    raise UserError(
      f'a batch of {config.train.batch_size} does not divide into the'
      f' {devices} devices; give another --batch'
    )
  model = build.make_model(config, args.classes)
  _, optimizer = build.make_schedule_and_optimizer(config)
  # What the weights are makes no difference to the time.
  weights = (1.0,) * args.classes if config.loss.class_weights else None
  step = build.make_train_step(config, model, optimizer, class_weights=weights)
  return model, optimizer, step


def input_pipeline(
  config: ml_collections.ConfigDict, args: Any
) -> dict[str, Any]:
  """Batches on the host, as training gets them; seconds are of a batch."""
  dataset = build.open_dataset(config, config.data.train_split)
  iterator = build.make_iterator(config, dataset)
  batches = -(-_WINDOW // config.train.batch_size)

  def window() -> None:
    for _ in range(batches):
      next(iterator)

  try:
    result = timing.timed(window, args.repeat)
  finally:
    iterator.close()
  result['seconds'] /= batches
  return result


def evaluation(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """The evaluation split under random weights; seconds are of a batch."""
  split = config.data.eval_split
  dataset = build.open_dataset(config, split)
  model = build.make_model(config, dataset.info.num_classes)
  state = steps.create_state(model, optax.identity(), config.seed)
  evaluator = build.make_evaluator(model, dataset, config)
  variables = distributed.replicate(evaluator.prepare(state.variables))
  result = timing.timed(
    lambda: evaluate.evaluate_variables(evaluator, variables, panels=0),
    args.repeat,
  )
  result['images'] = dataset.tally(split).num_images
  result['seconds'] *= config.eval.batch_size / result['images']
  return result


def compilation(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Tracing (to StableHLO) and compiling both steps, without the cache.

  The forward pass is that of `forward`, by variables that are prepared first.
  """
  jax.config.update('jax_enable_compilation_cache', False)
  model, optimizer, step = _training(config, args)
  batch = _batch(config, args)
  seconds = {}

  @contextlib.contextmanager
  def part(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[f'{name}_seconds'] = time.perf_counter() - start

  with part('create'):
    state = steps.create_state(model, optimizer, config.seed)
    jax.block_until_ready(state)
  with part('prepare'):
    variables = model.prepare(state.variables, tuple(config.data.crop_size))
    jax.block_until_ready(variables)
  apply = jax.jit(functools.partial(model.apply, train=False))
  with part('forward_trace'):
    lowered = apply.lower(variables, batch['image'])
  with part('forward_compile'):
    lowered.compile()
  with part('train_trace'):
    lowered = step.lower(distributed.replicate(state), distributed.shard(batch))
  with part('train_compile'):
    lowered.compile()
  return {**seconds, 'seconds': sum(seconds.values())}


def _batch(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Random images and labels of the size and number of training."""
  rng = np.random.default_rng(config.seed)
  shape = config.train.batch_size, *config.data.crop_size
  return {
    'image': rng.integers(0, 256, (*shape, 3), np.uint8),
    'label': rng.integers(0, args.classes, shape, np.uint8),
  }


def _network(
  call: Callable[[], Any],
  lower: Callable[[], Any],
  counts: dict[str, flops.Flops],
  config: ml_collections.ConfigDict,
  args: Any,
  *,
  devices: int,
) -> dict[str, Any]:
  """Times a step, and its share of what a matrix product does in the time.

  Operations are those of direct convolutions; others may need fewer.
  """
  result = timing.timed(call, args.repeat)
  rate = timing.matmul_rate(config.model.dtype) * devices
  backward = flops.backward(counts) if args.mode == 'train' else {}
  done = flops.total(counts, backward)
  result |= {
    'devices': devices,
    'flops': done.padded,
    'flops_on_map': done.on_map,
    'matmul_flops_per_second': rate,
    'utilization': done.padded / result['seconds'] / rate,
    'utilization_on_map': done.on_map / result['seconds'] / rate,
  }
  if args.layers:
    layers = profile.profile(call, lower().compile().as_text())
    if config.model.rematerialization == 'block':
      backward = {}  # these layers compute their forward pass again
    result['layers'] = _layers(layers, counts, backward)
  return result


def _layers(
  layers: list[profile.LayerTime],
  forward: dict[str, flops.Flops],
  backward: dict[str, flops.Flops],
) -> list[dict[str, Any]]:
  """The costliest ones; operations a second of those that convolve."""
  whole = sum(layer.seconds for layer in layers)
  rows = []
  for layer in layers[:_LAYERS]:
    row = {**layer._asdict(), 'share': layer.seconds / whole}
    count = (backward if layer.backward else forward).get(layer.name)
    if count:
      row['flops_on_map_per_second'] = count.on_map / layer.seconds
    rows.append(row)
  return rows


MODES: dict[str, Callable[..., dict[str, Any]]] = {
  'forward': forward,
  'train': train_step,
  'input': input_pipeline,
  'evaluation': evaluation,
  'compile': compilation,
}


def default_network() -> ml_collections.ConfigDict:
  """Measured without a recipe: ResNet-50, stride 16, crop 513, one a device."""
  config = get_config()
  config.model.update(
    backbone='resnet50', width=1.0, output_stride=16, aspp_features=256
  )
  config.data.crop_size = (513, 513)
  config.train.batch_size = jax.local_device_count()
  config.eval.batch_size = jax.local_device_count()
  return config


def _config(
  args: argparse.Namespace, argv: Sequence[str]
) -> ml_collections.ConfigDict:
  """The settings to measure."""
  config = from_recipe(args.config) if args.config else default_network()
  config, rest = options.override(config, ['measure', *argv])
  if rest:
    raise UserError(f'{rest[0]}: not an option')
  validate(config)
  return config


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Own options, and settings, for some of which --crop and --batch stand."""
  parser = options.Parser('deeplab_jax.benchmark.measure', __doc__)
  modes = *MODES, 'startup'
  parser.add_argument('--mode', choices=modes, required=True)
  parser.add_argument('--config', help='recipe, a Python file')
  count = options.positive_int
  parser.add_argument('--crop', type=count, help='height and width')
  parser.add_argument('--batch', type=count, help='images of a batch')
  parser.add_argument('--classes', type=count, default=21)
  parser.add_argument(
    '--repeat', type=count, help='timed calls; by default 3, more within 3 s'
  )
  parser.add_argument(
    '--layers', action='store_true', help='profile the layers too'
  )
  args, settings = parser.parse_known_args(argv)
  if args.crop:
    settings.append(f'--config.data.crop_size=({args.crop},{args.crop})')
  if args.batch:
    for part in ('train', 'eval'):
      settings.append(f'--config.{part}.batch_size={args.batch}')
  return args, settings


def main(argv: Sequence[str]) -> None:
  """Measures what the options say and prints it."""
  args, settings = _parse(argv)
  host.restart_on_huge_pages('deeplab_jax.benchmark.measure')
  host.prepare()
  about: dict[str, Any] = {'mode': args.mode}
  if args.mode == 'startup':
    result = startup.cold_and_warm(args.config, settings)
  else:
    config = _config(args, settings)
    result = MODES[args.mode](config, args)
    batch_size = (
      config.eval if args.mode == 'evaluation' else config.train
    ).batch_size
    if args.mode != 'evaluation':  # its images are of their own size
      about['crop'] = list(config.data.crop_size)
    about |= {
      'batch': batch_size,
      'backbone': config.model.backbone,
      'dtype': config.model.dtype,
      'device': jax.devices()[0].device_kind,
    }
    if args.mode != 'compile':
      result['images_per_second'] = batch_size / result['seconds']
  about |= {'jax': jax.__version__, 'cores': cores()}
  print(json.dumps(about | result), flush=True)


if __name__ == '__main__':
  options.log_to_stderr()
  with options.one_line_errors():
    main(sys.argv[1:])
