"""Training: how a run starts, its loop, and its end."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deeplab_jax import build, evaluate, import_weights, report
from deeplab_jax.config import flat, from_json, to_json, with_preset
from deeplab_jax.data.load import Dataset
from deeplab_jax.evaluation.evaluator import Scores
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import Preempted, UserError
from deeplab_jax.training import steps
from deeplab_jax.training.faults import CheckedMetrics, StopSignal
from deeplab_jax.training.writers import Progress, write_json
from deeplab_jax.weights import checkpoints

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Run:
  """What all parts of a run need."""

  config: ConfigDict
  workdir: Path
  dataset: Dataset
  saved: checkpoints.Checkpoints
  description: dict[str, Any]  # of network and classes, for each checkpoint


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
  before = _settings_before(workdir)
  _check(config, before)
  splits = config.data.train_split, config.data.eval_split
  dataset = build.open_dataset(config, *splits)
  suspect = evaluate.check_data(dataset, *splits)
  with checkpoints.Checkpoints(workdir) as saved:
    saved.remove_interrupted()
    config, load = _start(config, saved)
    latest, last = saved.latest_step, config.train.steps
    model, info = to_json(config)['model'], dataset.info.to_json()
    described = checkpoints.describe(model, info)
    if latest is not None:
      metadata = saved.metadata(latest)
      checkpoints.check_same_architecture(metadata, described, workdir)
    run = _Run(config, workdir, dataset, saved, described)
    changes = ', '.join(
      f'config.{key}={value} (was {before[key]})'
      for key, value in flat(config).items()
      if latest and before.get(key, value) != value
    )
    if (latest or 0) < last:
      if changes:
        log.info('changed: %s', changes)
      for finding in suspect:  # now that nothing else is refused
        log.warning('%s', finding.line)
      # Signals are noted from here: JAX crashes if interrupted in compiling.
      with StopSignal() as stop:
        _train(run, load, stop)
    else:
      log.info('%s is trained: step %d of %d', workdir, latest, last)
      if changes:
        log.warning('not used, since no step is left: %s', changes)
  return _finish(config, workdir)


def _start(
  config: ConfigDict, saved: checkpoints.Checkpoints
) -> tuple[ConfigDict, Callable[..., Any]]:
  """Decides what a run starts from: the first of these that there is.

  1. The latest checkpoint in the workdir.
  2. Weights that were imported into the workdir, a checkpoint of step 0. The
     optimizer starts afresh.
  3. The weights that `config.init_from` names.
  4. Random weights, drawn from `config.seed`.

  It returns the configuration with their preset, and what loads them into a
  fresh state.
  """
  step = saved.latest_step
  if step is not None:
    config = with_preset(config, checkpoints.preset_of(saved.metadata(step)))
  if step:
    return config, lambda state: saved.restore(step, state)
  if step == 0:
    return config, lambda state: state.replace(**saved.restore_variables(0))
  if config.init_from:
    weights, config = import_weights.open_source(config)
    return config, lambda s: import_weights.initialize(weights, s, config)
  return with_preset(config, 'paper'), lambda state: state


def _build(run: _Run, load: Callable[..., Any]) -> tuple[Any, ...]:
  """Makes the initial state, the step, the learning rates, the evaluator."""
  config, dataset, scored = run.config, run.dataset, run.config.data.eval_split
  model = build.make_model(config, dataset.info.num_classes)
  schedule, optimizer = build.make_schedule_and_optimizer(config)
  weights = build.class_weights(config, dataset)
  void = dataset.info.ignore_label
  train_step = build.make_train_step(
    config, model, optimizer, ignore_label=void, class_weights=weights
  )
  evaluator = build.make_evaluator(model, dataset, config) if scored else None
  state = load(steps.create_state(model, optimizer, config.seed))
  count = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
  start = f'continuing from step {state.step}' if state.step else 'step 0'
  log.info(f'{config.model.backbone}, {count:.1f} million parameters, {start}')
  return distributed.replicate(state), train_step, schedule, evaluator


def _train(run: _Run, load: Callable[..., Any], stop: StopSignal) -> None:
  """Trains to the last step, or to a signal; both end with a checkpoint."""
  state, train_step, schedule, evaluator = _build(run, load)
  settings, saved, start = run.config.train, run.saved, int(state.step)
  if stop.requested(start):
    raise Preempted(stop.number, start)
  batches = build.make_iterator(run.config, run.dataset, start)
  with (
    contextlib.closing(batches),
    build.make_writer(run.config, run.workdir, start) as writer,
    Progress(settings.steps, start) as progress,
    CheckedMetrics(progress.write) as checked,
  ):
    progress.status('compiling ...')
    since, then = start, time.monotonic()
    batch = distributed.put(next(batches))
    for step in range(start + 1, settings.steps + 1):
      last = step == settings.steps
      state, metrics = train_step(state, batch)
      checked.add(step, metrics)
      if not last:  # while the devices work
        batch = distributed.put(next(batches))
      if step == start + 1:
        progress.start_clock(step)
      if logs := last or step % settings.log_every == 0:
        values = checked.fetch(saved.latest_step)
        speed = (step - since) / (time.monotonic() - then)
        values['learning_rate'] = float(schedule(step - 1))
        values['images_per_second'] = speed * settings.batch_size
        writer.scalars(step, values)
        progress.update(step, values)
      stopping = stop.requested(step)
      due = last or step % settings.eval_every == 0
      if due or stopping:
        checked.fetch(saved.latest_step)
        scores = None
        if due and evaluator:
          shown = run.config.eval.panels, run.config.eval.worst_and_best
          scores = evaluator.run(state.variables, *shown)
          evaluate.log_scores(step, scores, shown[0], writer, progress)
        _save(run, start, state, scores)
      if stopping and not last:
        raise Preempted(stop.number, step)
      if logs or due or stopping or step == start + 1:
        since, then = step, time.monotonic()


def _save(run: _Run, start: int, state: Any, scores: Scores | None) -> None:
  """Starts to save; after the first checkpoint it writes `config.json`.

  Of the best checkpoint it writes what the report shows.
  """
  is_new = run.saved.latest_step in (None, start)
  metadata = {'metrics': scores.metrics} if scores else {}
  distributed.check_run(run.workdir)
  run.saved.save(state, {**run.description, **metadata})
  first, step = distributed.is_first_process(), int(state.step)
  if scores and first and run.saved.step_named('best') == step:
    evaluate.save_best(run.config, run.workdir, scores, step)
  if is_new:  # only now: a run that dies before leaves no trace
    run.saved.wait()
    if first:
      write_json(run.workdir / 'config.json', to_json(run.config))


def _finish(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Reports the best checkpoint; without evaluation, names the latest one."""
  scored, first = config.data.eval_split, distributed.is_first_process()
  with checkpoints.Checkpoints(workdir) as saved:
    step = saved.step_named('best' if scored else 'latest')
    metrics = saved.metadata(step).get('metrics')
  if not scored:
    if first:
      why = 'config.data.eval_split is empty'
      print(f'{workdir} holds step {step}, not evaluated: {why}')
      report.report(workdir)
    return {'step': step}
  if metrics is None:  # stopped by a signal, before its evaluation
    result = evaluate.evaluate(config, workdir)
  else:
    result = {**metrics, 'step': step}
    if first:
      evaluate.print_report(result)
  if first:
    write_json(workdir / 'eval.json', result)
    report.report(workdir)
  return result


def _settings_before(workdir: Path) -> dict[str, Any]:
  """What the workdir was last trained with, by key; empty if not known."""
  with contextlib.suppress(UserError, OSError):
    return flat(from_json(workdir / 'config.json'))
  return {}


def _check(config: ConfigDict, before: dict[str, Any]) -> None:
  """Checks the settings that depend on the devices and on the workdir."""
  warmup, last = config.optimizer.warmup_steps, config.train.steps
  if warmup > last and warmup != before.get('optimizer.warmup_steps'):
    raise UserError(
      f'config.optimizer.warmup_steps={warmup} must be at most'
      f' config.train.steps={last}'
    )
  devices, batch_size = jax.device_count(), config.train.batch_size
  if batch_size % devices:
    raise UserError(
      f'config.train.batch_size={batch_size} must be divisible by the'
      f' {devices} devices'
    )
  per_norm = batch_size if config.train.sync_bn else batch_size // devices
  if per_norm == 1 and not config.train.freeze_bn:
    log.warning(
      'batch normalization sees one image at a time: that of the image pooling'
      ' gets one value per channel and yields only its bias; use a larger'
      ' config.train.batch_size or config.train.freeze_bn=True'
    )
