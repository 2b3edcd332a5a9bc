"""One measurement in this process: python -m deeplab_jax.measure --mode=MODE.

Prints one JSON line. `benchmark` runs it once a measurement, so that neither
their memory nor their compilations mix.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn

from deeplab_jax import (
  distributed,
  evaluate,
  flops,
  host,
  options,
  profile,
  steps,
  train,
)
from deeplab_jax.config import from_recipe, get_config, validate
from deeplab_jax.data.pipeline import cores
from deeplab_jax.errors import UserError

_WINDOW = 256  # images that the input pipeline loads for one timing
_LAYERS = 10
_CALLS, _SECONDS = 3, 3.0  # timed, at least


def forward(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Logits of full size from images that lie on one device.

  By prepared variables, as `--mode=eval` takes them.
  """
  model = train.make_model(config, args.classes)
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
  model = train.make_model(config, args.classes)
  _, optimizer = train.make_schedule_and_optimizer(config)
  # What the weights are makes no difference to the time.
  weights = (1.0,) * args.classes if config.loss.class_weights else None
  step = train.make_train_step(config, model, optimizer, class_weights=weights)
  return model, optimizer, step


def input_pipeline(
  config: ml_collections.ConfigDict, args: Any
) -> dict[str, Any]:
  """Batches on the host, as training gets them; seconds are of a batch."""
  dataset = evaluate.open_dataset(config, config.data.train_split)
  iterator = train.make_iterator(config, dataset)
  batches = -(-_WINDOW // config.train.batch_size)

  def window() -> None:
    for _ in range(batches):
      next(iterator)

  try:
    result = _timed(window, args.repeat)
  finally:
    iterator.close()
  result['seconds'] /= batches
  return result


def evaluation(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """The evaluation split under random weights; seconds are of a batch."""
  split = config.data.eval_split
  dataset = evaluate.open_dataset(config, split)
  model = train.make_model(config, dataset.info.num_classes)
  state = steps.create_state(model, optax.identity(), config.seed)
  evaluator = evaluate.make_evaluator(model, dataset, config)
  variables = distributed.replicate(evaluator.prepare(state.variables))
  result = _timed(
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
  def timing(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[f'{name}_seconds'] = time.perf_counter() - start

  with timing('create'):
    state = steps.create_state(model, optimizer, config.seed)
    jax.block_until_ready(state)
  with timing('prepare'):
    variables = model.prepare(state.variables, tuple(config.data.crop_size))
    jax.block_until_ready(variables)
  apply = jax.jit(functools.partial(model.apply, train=False))
  with timing('forward_trace'):
    lowered = apply.lower(variables, batch['image'])
  with timing('forward_compile'):
    lowered.compile()
  with timing('train_trace'):
    lowered = step.lower(distributed.replicate(state), distributed.shard(batch))
  with timing('train_compile'):
    lowered.compile()
  return {**seconds, 'seconds': sum(seconds.values())}


def startup(args: Any, settings: Sequence[str]) -> dict[str, Any]:
  """From the command of training to its first finished step.

  Without a recipe that of the default run, not of `default_network`.
  Cold in a new workdir, with data still to be prepared and nothing compiled;
  warm once more in the same workdir.
  """
  result = {'import_seconds': _import_seconds()}
  environment = dict(os.environ)
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  with tempfile.TemporaryDirectory() as folder:
    command = [
      *(sys.executable, '-m', 'deeplab_jax.main'),
      f'--workdir={folder}/workdir',
      f'--config.data.prepared_dir={folder}/prepared',
      '--config.train.log_every=1',
      *([f'--config={args.config}'] if args.config else []),
      *settings,
    ]
    for name in ('cold', 'warm'):
      result[f'{name}_seconds'] = _first_step_seconds(command, environment)
  return {**result, 'seconds': result['warm_seconds']}


def _import_seconds() -> float:
  start = time.perf_counter()
  program = 'import deeplab_jax.train'
  subprocess.run([sys.executable, '-c', program], check=True)
  return time.perf_counter() - start


def _first_step_seconds(
  command: Sequence[str], environment: dict[str, str]
) -> float:
  start = time.perf_counter()
  lines = []
  with subprocess.Popen(
    command,
    env=environment,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      for line in process.stderr:
        lines.append(line)
        if line.startswith('step '):
          return time.perf_counter() - start
    finally:
      with contextlib.suppress(OSError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
  said = ''.join(lines[-1:]).strip().removeprefix('error: ')
  raise UserError(f'training ended before its first step: {said}')


def _batch(config: ml_collections.ConfigDict, args: Any) -> dict[str, Any]:
  """Random images and labels of the size and number of training."""
  rng = np.random.default_rng(config.seed)
  shape = config.train.batch_size, *config.data.crop_size
  return {
    'image': rng.integers(0, 256, (*shape, 3), np.uint8),
    'label': rng.integers(0, args.classes, shape, np.uint8),
  }


def _timed(call: Callable[[], Any], repeat: int | None) -> dict[str, Any]:
  """One call to warm up, then the best of `repeat` others.

  By default of three and as many more as begin within three seconds: of short
  calls the first dozen vary most, while memory is found for them.
  """
  with _compilations() as compiled:
    start = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    best, calls, begin = float('inf'), 0, time.perf_counter()
    while calls < (repeat or _CALLS) or (
      not repeat and time.perf_counter() - begin < _SECONDS
    ):
      start = time.perf_counter()
      jax.block_until_ready(call())
      best = min(best, time.perf_counter() - start)
      calls += 1
  return {
    'seconds': best,
    'calls': calls,
    'first_seconds': first,
    'compilations': len(compiled),
    'compile_seconds': sum(compiled),
    **_memory(),
  }


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
  """The seconds of each compilation within."""
  seconds = []

  def listen(event: str, duration: float, **_: Any) -> None:
    if 'backend_compile' in event:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _memory() -> dict[str, int]:
  """The most that this process has used so far, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  memory = {'peak_memory': peak}
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    memory['peak_device_memory'] = stats['peak_bytes_in_use']
  return memory


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
  result = _timed(call, args.repeat)
  rate = matmul_rate(config.model.dtype) * devices
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


def matmul_rate(dtype: str) -> float:
  """Operations a second of a large matrix product on one device."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(jnp.dot)
  jax.block_until_ready(product(a, b))
  best = float('inf')
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(product(a, b))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


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
  parser = options.Parser('deeplab_jax.measure', __doc__)
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
  host.restart_on_huge_pages('deeplab_jax.measure')
  host.prepare()
  about: dict[str, Any] = {'mode': args.mode}
  if args.mode == 'startup':
    result = startup(args, settings)
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
