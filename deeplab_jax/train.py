"""Training: how a run starts, its loop, and its end."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deeplab_jax import build, evaluate, import_weights, report
from deeplab_jax.config import flat, to_json, with_preset
from deeplab_jax.configure import last_used
from deeplab_jax.data.load import Dataset
from deeplab_jax.runtime import distributed, own, watchdog
from deeplab_jax.runtime.errors import Preempted
from deeplab_jax.runtime.files import check_held, write_json
from deeplab_jax.training import steps
from deeplab_jax.training.faults import CheckedMetrics, Diverged, StopSignal
from deeplab_jax.training.writers import Progress
from deeplab_jax.weights import networks
from deeplab_jax.weights.checkpoints import Checkpoints

log = logging.getLogger(__name__)
_load = watchdog.phase('input')(lambda it: distributed.put(next(it)))

_ROLLBACKS = 3  # in a run


@dataclasses.dataclass(frozen=True)
class _Run:
  """What all parts of a run need."""

  config: ConfigDict
  workdir: Path
  dataset: Dataset
  saved: Checkpoints
  load: Callable[[Any], Any]  # of what it starts from, into a fresh state
  description: dict[str, Any]  # of network and classes, for each checkpoint
  # Where it went back to, and how many batches it passed over there.
  skipped: tuple[tuple[int, int], ...] = ()


@distributed.one_run
def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Trains in `workdir`; a run that was stopped goes on where it was.

  Writes checkpoints, TensorBoard events, `metrics.jsonl`, `config.json`,
  pictures, and at the end the metrics of the best checkpoint (`eval.json`),
  which it returns, and `report.html`. With an empty `config.data.eval_split`
  there are no metrics, and it returns the `step` of the latest checkpoint.

  Raises:
    UserError: if settings, data or workdir do not fit, another run uses the
      workdir, or the loss diverges.
    Preempted: if a signal stopped the run, after a checkpoint.
  """
  before = last_used(workdir)
  build.check_batches(config, before)
  splits = config.data.train_split, config.data.eval_split
  dataset = build.open_dataset(config, *splits)
  suspect = evaluate.check_data(dataset, *splits)
  keep, every = config.train.keep, config.train.keep_every
  with Checkpoints(workdir, keep=keep, keep_every=every) as saved:
    saved.remove_interrupted()
    run, start = _start(config, workdir, dataset, saved)
    changes = ', '.join(
      f'config.{key}={value} (was {before[key]})'
      for key, value in flat(run.config).items()
      if start and before.get(key, value) != value
    )
    total, scored = config.train.steps, config.data.eval_split
    if start < total or (scored and not saved.metrics(start)):
      if changes:
        log.info('changed: %s', changes)
      for finding in suspect:  # now that nothing else is refused
        log.warning('%s', finding.line)
      # Signals are noted from here: JAX crashes if interrupted in compiling.
      with StopSignal() as stop:
        _train_on(run, stop)
    else:
      log.info('%s is trained: step %d of %d', workdir, start, total)
      if changes:
        log.warning('not used, since no step is left: %s', changes)
  distributed.barrier()
  result = evaluate.finish(run.config, workdir)
  if distributed.is_first_process():
    report.report(workdir)
  return result


def _start(
  config: ConfigDict, workdir: Path, dataset: Dataset, saved: Checkpoints
) -> tuple[_Run, int]:
  """Decides what a run starts from: the first of these that there is.

  1. The latest checkpoint in the workdir that is not damaged.
  2. Weights that were imported into the workdir, a checkpoint of step 0. The
     optimizer starts afresh.
  3. The weights that `config.init_from` names.
  4. Random weights, drawn from `config.seed`.

  It returns the run, with their preset in its configuration, and the step.
  """
  latest = saved.open('latest') if saved.steps else None
  distributed.check_same({f'{workdir}: its step': latest and latest.step})
  if latest:
    config = with_preset(config, networks.preset_of(latest.metadata))
    load = latest.fill
  elif config.init_from:
    weights, config = import_weights.open_source(config, dataset.info)
    load = functools.partial(import_weights.initialize, weights, config=config)
  else:
    config, load = with_preset(config, 'paper'), lambda state: state
  model, info = to_json(config)['model'], dataset.info.to_json()
  described = networks.describe(model, info)
  run = _Run(config, workdir, dataset, saved, load, described)
  if not latest:
    return run, 0
  networks.check_same_architecture(latest.metadata, described, workdir)
  saved.set_aside(after=latest.step)
  skipped = tuple(map(tuple, latest.metadata.get('skipped', ())))
  return dataclasses.replace(run, skipped=skipped), latest.step


def _train_on(run: _Run, stop: StopSignal) -> None:
  """Trains to the end; may go back when the loss diverges.

  It then goes on from the latest checkpoint with the batches after the one
  that did it, at most three times in a run.
  """
  while True:
    try:
      return _train(run, stop)
    except Diverged as error:
      count = len(run.skipped) + 1
      if run.config.train.on_nan == 'stop' or count > _ROLLBACKS:
        raise
      run.saved.wait()
      distributed.barrier()
      again, start = _start(run.config, run.workdir, run.dataset, run.saved)
      passed = start, error.step - start
      run = dataclasses.replace(again, skipped=(*run.skipped, passed))
      log.warning(
        '%s at step %d: back to step %d and past %d batches (%d of %d)',
        *(error.what, error.step, *passed, count, _ROLLBACKS),
      )


def _build(run: _Run) -> tuple[Any, ...]:
  """Makes the initial state, the step, the learning rates, the evaluator."""
  config, dataset, scored = run.config, run.dataset, run.config.data.eval_split
  info = dataset.info
  model = build.make_model(config, info.num_classes, **info.normalization)
  schedule, optimizer = build.make_schedule_and_optimizer(config)
  weights = build.class_weights(config, dataset)
  of_data = {'ignore_label': info.ignore_label, 'class_weights': weights}
  train_step = build.make_train_step(config, model, optimizer, **of_data)
  evaluator = build.make_evaluator(model, dataset, config) if scored else None
  state = run.load(steps.create_state(model, optimizer, config.seed))
  state = state.with_ema(config.train.ema is not None)
  count = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
  start = f'continuing from step {state.step}' if state.step else 'step 0'
  start += ', averages of the parameters (config.train.ema)' * bool(state.ema)
  log.info(f'{config.model.backbone}, {count:.1f} million parameters, {start}')
  return distributed.replicate(state), train_step, schedule, evaluator


def _train(run: _Run, stop: StopSignal) -> None:
  """Trains to the last step, or to a signal; both end with a checkpoint."""
  state, train_step, schedule, evaluator = _build(run)
  settings, saved, start = run.config.train, run.saved, int(state.step)
  if stop.requested():
    raise Preempted(stop.number, start)
  limit = 20 if settings.on_nan == 'rollback' else math.inf
  save_every = settings.save_every or settings.eval_every
  first = start + sum(count for _, count in run.skipped)
  batches = build.make_iterator(run.config, run.dataset, first)
  with (
    watchdog.watching(settings.watchdog_minutes, run.workdir, start),
    contextlib.closing(batches),
    build.make_writer(run.config, run.workdir, start) as writer,
    Progress(settings.steps, start) as progress,
    CheckedMetrics(progress.write, lambda: saved.latest_step, limit) as checked,
  ):
    score = functools.partial(
      evaluate.score_checkpoint,
      *(evaluator, run.saved, run.config, run.workdir, writer, progress),
      stop=stop,
    )
    if start and evaluator:
      if metrics := saved.metrics(start):
        evaluate.log_metrics(start, metrics, writer)
      elif start >= settings.steps or start % settings.eval_every == 0:
        score(state)  # it was interrupted
    if start >= settings.steps:
      return
    progress.status('compiling ...')
    since, then = start, (saved_at := time.monotonic())
    batch = _load(batches)
    for step in range(start + 1, settings.steps + 1):
      last = step == settings.steps
      state, metrics = train_step(state, batch)
      checked.add(step, metrics)
      if not last:  # while the devices work
        batch = _load(batches)
      if step == start + 1:
        progress.start_clock(step)
      if logs := last or step % settings.log_every == 0:
        values = checked.fetch()
        speed = (step - since) / (time.monotonic() - then)
        values['learning_rate'] = float(schedule(step - 1))
        values['images_per_second'] = speed * settings.batch_size
        if run.skipped:
          values['skipped_batches'] = first - start
        writer.scalars(step, values)
        progress.update(step, values)
      stopping = stop.requested()
      scoring = evaluator and (last or step % settings.eval_every == 0)
      saving = last or stopping or scoring or step % save_every == 0
      if logs and not saving:
        passed = time.monotonic() - saved_at
        saving = any(distributed.gathered(passed > 60 * settings.save_minutes))
      if saving:
        checked.fetch()
        _save(run, state)
        saved_at = time.monotonic()
      if stopping and not last:
        raise Preempted(stop.number, step)
      if scoring:
        score(state)
      if logs or saving or step == start + 1:
        since, then = step, time.monotonic()


@watchdog.phase('save')
def _save(run: _Run, state: Any) -> None:
  """Starts to save, and `config.json` after that: none without a checkpoint."""
  settings, metadata = to_json(run.config), run.description
  own.remember(settings)
  if distributed.is_first_process():
    check_held(run.workdir)
  write = functools.partial(write_json, run.workdir / 'config.json', settings)
  run.saved.save(state, {**metadata, 'skipped': run.skipped}, then=write)
