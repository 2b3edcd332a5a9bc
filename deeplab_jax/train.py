"""Training, from the first step to the table of measures."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import optax
from flax.traverse_util import flatten_dict

from deeplab_jax import build, evaluate, import_weights
from deeplab_jax.config import (
  from_json,
  to_json,
  with_preset,
)
from deeplab_jax.data.load import Dataset
from deeplab_jax.data.survey import check_tallies
from deeplab_jax.evaluation.metrics import format_table, summary
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training import steps
from deeplab_jax.training.faults import StopSignal
from deeplab_jax.training.writers import Progress, Writer, write_json
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.weights import checkpoints
from deeplab_jax.weights.load import Pretrained

log = logging.getLogger(__name__)


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: Path
) -> dict[str, Any]:
  """Trains in `workdir`, from its latest checkpoint if there is one.

  Else it starts from the weights that `config.init_from` names, or random ones.

  Writes checkpoints, TensorBoard events, `metrics.jsonl`, `config.json`,
  pictures, and at the end the measures of the best checkpoint (`eval.json`).
  With an empty `config.data.eval_split` it saves as often, without measures.

  Returns:
    The measures of the best checkpoint, see `evaluate.evaluate`; without
    evaluation the `step` of the latest alone.

  Raises:
    UserError: if the configuration, the data or the workdir cannot be used, or
      the loss is no longer finite.
  """
  _check_batch(config)
  _check_warmup(config, workdir)
  data = config.data
  dataset = build.open_dataset(config, data.train_split, data.eval_split)
  _check_splits(dataset, data.train_split, data.eval_split)
  suspect = check_tallies(
    dataset.info,
    {s: dataset.tally(s) for s in (data.train_split, data.eval_split) if s},
    data.train_split,
  )
  with checkpoints.Checkpoints(workdir) as saved:
    saved.remove_interrupted()
    latest, pretrained = saved.latest_step, None
    if latest is not None:
      preset = checkpoints.preset_of(saved.metadata(latest))
      config = with_preset(config, preset)
    elif config.init_from:
      pretrained, config = import_weights.open_source(config)
    config = with_preset(config, 'paper')
    description = checkpoints.describe(
      to_json(config)['model'], dataset.info.to_json()
    )
    if latest is not None:
      checkpoints.check_same_architecture(
        saved.metadata(latest), description, workdir
      )
    changes = _changes(config, workdir) if latest else ''
    if latest is not None and latest >= config.train.steps:
      log.info(
        '%s is trained: step %d of %d', workdir, latest, config.train.steps
      )
      if changes:
        log.warning('not used, since no step is left: %s', changes)
    else:
      if changes:
        log.info('changed: %s', changes)
      # Noted from here on: JAX crashes when it is interrupted in compiling.
      with StopSignal() as stop:
        training = _Training(
          config, workdir, dataset, saved, description, pretrained
        )
        for finding in suspect:  # now that nothing else is refused
          log.warning('%s', finding.line)
        training.run(stop)
      saved.wait()
    if not data.eval_split:
      return _report_unevaluated(saved.step_named('latest'), workdir)
    best = saved.step_named('best')
    measures = saved.metadata(best).get('metrics')
  if measures is None:  # stopped by a signal, before its evaluation
    result = evaluate.evaluate(config, workdir)
  else:
    result = {**measures, 'step': best}
    evaluate.print_report(result)
  if distributed.is_first_process():
    write_json(workdir / 'eval.json', result)
  return result


def _check_splits(dataset: Dataset, trained: str, scored: str) -> None:
  """Refuses to score images that are trained on, unless that is meant."""
  if trained == scored:
    log.warning(
      'config.data.eval_split=%s is what is trained on: the score says nothing'
      ' about other images',
      scored,
    )
    return
  shared = dataset.shared_names(trained, scored) if scored else []
  if shared:
    raise UserError(
      f'config.data.train_split={trained} and config.data.eval_split={scored}'
      f' share {len(shared)} images ({shared[0]}, ...), which makes the score'
      ' worthless; take splits that share none, or train without evaluation:'
      " config.data.eval_split=''"
    )


def _report_unevaluated(step: int, workdir: Path) -> dict[str, Any]:
  if distributed.is_first_process():
    print(
      f'{workdir} holds step {step}, not evaluated: config.data.eval_split is'
      ' empty'
    )
  return {'step': step}


def _settings_of(workdir: Path) -> ml_collections.ConfigDict | None:
  """What the workdir was last trained with, None where that is not known."""
  try:
    return from_json(workdir / 'config.json')
  except (UserError, OSError):
    return None


def _changes(config: ml_collections.ConfigDict, workdir: Path) -> str:
  """The settings that are not those the workdir was last trained with."""
  before = _settings_of(workdir)
  if before is None:
    return ''
  was, now = (flatten_dict(to_json(c), sep='.') for c in (before, config))
  return ', '.join(
    f'config.{key}={value} (was {was[key]})'
    for key, value in now.items()
    if value != was[key]
  )


def _check_warmup(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Refuses a warm-up without an end, but where a run had it already."""
  warmup, steps = config.optimizer.warmup_steps, config.train.steps
  remembered = _settings_of(workdir)
  had = remembered is not None and remembered.optimizer.warmup_steps == warmup
  if warmup > steps and not had:
    raise UserError(
      f'config.optimizer.warmup_steps={warmup} must be at most'
      f' config.train.steps={steps}'
    )


def _check_batch(config: ml_collections.ConfigDict) -> None:
  devices, batch_size = jax.device_count(), config.train.batch_size
  if batch_size % devices:
    raise UserError(
      f'config.train.batch_size={batch_size} must be divisible by the'
      f' {devices} devices'
    )
  per_norm = batch_size if config.train.sync_bn else batch_size // devices
  if per_norm == 1 and not config.train.freeze_bn:
    log.warning(
      'batch normalisation sees one image at a time: that of the image pooling'
      ' gets a single value per channel and yields its bias alone; use a larger'
      ' config.train.batch_size or config.train.freeze_bn=True'
    )


class _Training:
  """The loop and what it holds on to."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: Path,
    dataset: Dataset,
    saved: checkpoints.Checkpoints,
    description: dict[str, Any],
    pretrained: Pretrained | None,
  ) -> None:
    self.config, self.workdir, self.dataset = config, workdir, dataset
    self.saved, self.description = saved, description
    model = build.make_model(config, dataset.info.num_classes)
    self.schedule, transformation = build.make_schedule_and_optimizer(config)
    self.train_step = build.make_train_step(
      config,
      model,
      transformation,
      ignore_label=dataset.info.ignore_label,
      class_weights=build.class_weights(config, dataset),
    )
    if config.data.eval_split:
      evaluate.check_labels(dataset, config.data.eval_split)
      self.evaluator = build.make_evaluator(model, dataset, config)
    self.state = self._initial_state(model, transformation, pretrained)
    self.start = int(self.state.step)
    self.pending: list[tuple[int, dict[str, jax.Array]]] = []
    self.empty_batches = 0
    self.noted = False  # the configuration, in config.json

  def _initial_state(
    self,
    model: Any,
    transformation: optax.GradientTransformation,
    pretrained: Pretrained | None,
  ) -> steps.TrainState:
    state = steps.create_state(model, transformation, self.config.seed)
    latest = self.saved.latest_step
    count = sum(x.size for x in jax.tree.leaves(state.params))
    log.info(
      '%s, %.1f million parameters, %d images',
      self.config.model.backbone,
      count / 1e6,
      self.dataset.tally(self.config.data.train_split).num_images,
    )
    if latest == 0:  # imported: the optimizer starts afresh
      log.info('starting from the weights imported into %s', self.workdir)
      state = state.replace(**self.saved.restore_variables(latest))
    elif latest is not None:
      log.info('continuing from step %d', latest)
      state = self.saved.restore(latest, state)
    elif pretrained is not None:
      state = import_weights.initialize(pretrained, state, self.config)
    return distributed.replicate(state)

  def run(self, stop: StopSignal) -> None:
    """Trains to the end, or to a signal, after a checkpoint."""
    if stop.requested(self.start):
      raise SystemExit(stop.exit_status(self.start))
    train = self.config.train
    first = distributed.is_first_process()
    iterator = build.make_iterator(self.config, self.dataset, self.start)
    with (
      Writer(self.workdir, enabled=first, start_step=self.start) as writer,
      Progress(train.steps, self.start, enabled=first) as progress,
    ):
      try:
        self._start_clock(self.start, progress)
        batch = distributed.put(next(iterator))
        progress.status('compiling ...')
        for step in range(self.start + 1, train.steps + 1):
          last = step == train.steps
          self.state, measures = self.train_step(self.state, batch)
          if not last:
            # The devices work already: this takes none of their time.
            batch = distributed.put(next(iterator))
          self.pending.append((step, measures))
          if step % train.log_every == 0 or last:
            self._log(step, writer, progress)
          elif step == self.start + 1:
            self._start_clock(step, progress)  # it was compiled
          stopping = stop.requested(step)
          due = step % train.eval_every == 0 or last
          if due and self.config.data.eval_split:
            self._evaluate_and_save(step, writer, progress)
          elif due or stopping:
            self._check_measures(progress)
            self._save(self.description)
            self._start_clock(step)
          if stopping and not last:
            raise SystemExit(stop.exit_status(step))
      finally:
        iterator.close()
        if self.empty_batches > 1:
          progress.write(
            f'warning: {self.empty_batches} batches had no valid pixel'
          )

  def _start_clock(self, step: int, progress: Progress | None = None) -> None:
    """Counts the images of the steps after this one, for their speed.

    And for the time that is left, where `progress` is given.
    """
    self.clock = step, time.monotonic()
    if progress is not None:
      progress.start_clock(step)

  def _save(self, metadata: dict[str, Any]) -> None:
    """Starts to save; notes with the first what the run was trained with."""
    self.saved.save(self.state, metadata)
    if not self.noted:
      # Only once it is there: a run that dies before leaves no trace.
      self.saved.wait()
      if distributed.is_first_process():
        write_json(self.workdir / 'config.json', to_json(self.config))
      self.noted = True

  def _check_measures(self, progress: Progress) -> dict[str, float]:
    """Fetches the measures of the steps since the last call.

    The first batch without a valid pixel is warned about, others are counted.

    Returns:
      Those of the last step.

    Raises:
      UserError: at the first step whose loss or gradient is not finite.
    """
    values = {}
    for step, measures in self.pending:
      values = {k: float(v[0]) for k, v in jax.device_get(measures).items()}
      for name, value in values.items():
        if not math.isfinite(value):
          kept = self.saved.latest_step
          raise UserError(
            f'{name} is {value} at step {step}; lower'
            ' config.optimizer.learning_rate or set config.optimizer.clip_norm.'
            + (
              f' The checkpoint of step {kept} is kept'
              if kept is not None
              else ''
            )
          )
      if not values['valid_pixels']:
        self._count_empty(step, progress)
    self.pending.clear()
    return values

  def _count_empty(self, step: int, progress: Progress) -> None:
    self.empty_batches += 1
    if self.empty_batches == 1:
      progress.write(
        f'warning: the batch of step {step} has no valid pixel, and nothing is'
        ' learned from it: its crops show void alone, or classes whose weight'
        ' in config.loss.class_weights is 0; more are counted until the end'
      )

  def _log(self, step: int, writer: Writer, progress: Progress) -> None:
    values = self._check_measures(progress)
    since, then = self.clock
    images = (step - since) * self.config.train.batch_size
    speed = images / max(time.monotonic() - then, 1e-9)
    self._start_clock(step)
    rate = float(self.schedule(step - 1))
    writer.scalars(
      step, {**values, 'learning_rate': rate, 'images_per_second': speed}
    )
    progress.update(step, speed, values['loss'], rate)

  def _evaluate_and_save(
    self, step: int, writer: Writer, progress: Progress
  ) -> None:
    self._check_measures(progress)
    measures, _, picture = evaluate.evaluate_variables(
      self.evaluator, self.state.variables, self.config.eval.panels
    )
    self._save({**self.description, 'metrics': measures})
    writer.text(step, 'eval_table', format_table(measures))
    scalars = summary(measures)
    writer.scalars(step, {f'eval_{k}': v for k, v in scalars.items()})
    if picture is not None and distributed.is_first_process():
      writer.image(step, 'eval', picture)
      folder = self.workdir / 'panels'
      folder.mkdir(exist_ok=True)
      visualize.save_png(folder / f'step_{step:08d}.png', picture)
    line = '  '.join(f'{k} {v:.4f}' for k, v in scalars.items())
    progress.write(f'step {step}: {line}')
    self._start_clock(step)
