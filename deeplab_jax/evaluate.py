"""Evaluation of a checkpoint over a whole split."""

import csv
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deeplab_jax import build, ops
from deeplab_jax.config import to_json, with_preset
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.load import Dataset
from deeplab_jax.data.survey import Finding, check_tallies
from deeplab_jax.evaluation import image_table
from deeplab_jax.evaluation.evaluator import Evaluator, Scores, write_archive
from deeplab_jax.evaluation.metrics import extremes, format_table, summary
from deeplab_jax.evaluation.protocols import Protocol
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import Preempted, UserError
from deeplab_jax.runtime.files import as_path, write, write_json
from deeplab_jax.training.faults import StopSignal
from deeplab_jax.training.writers import Progress, Writer
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.visualize.figures import confusion_picture
from deeplab_jax.weights import networks
from deeplab_jax.weights.checkpoints import Checkpoints

log = logging.getLogger(__name__)


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Evaluates a checkpoint of `workdir`; prints and returns its metrics.

  It writes them into the folder `eval` with pictures: NAME.json, NAME.png (the
  first images), NAME_confusion.png and .csv, NAME_images.csv, NAME_worst.png
  and NAME_best.png. NAME tells the split, the protocol and what is not the
  default, as `val_whole_flip_step300`. With `config.eval.save_predictions` it
  writes the archive NAME.tar.gz, and for a split without labels nothing else.
  Raises `UserError` if the checkpoint or the data cannot be used.
  """
  networks.check_workdir(workdir)
  split, saves = config.data.eval_split, config.eval.save_predictions
  if not split:
    raise UserError(
      'config.data.eval_split is empty, as for training without evaluation;'
      ' name a split: --config.data.eval_split=val'
    )
  dataset = build.open_dataset(config, split)
  check_splits(dataset, config.data.train_split, split)
  if not saves:
    check_labels(dataset, split)
  network = networks.open_network(
    workdir, config.eval.step, to_json(config)['model'], dataset.info.to_json()
  )
  config = with_preset(config, network.model['preset'])
  info = DatasetInfo.from_json(network.dataset)
  model = build.make_model(config, info.num_classes, **info.normalization)
  # Padding has the color of the images that the network was trained on.
  own = dataclasses.replace(dataset.info, mean=info.mean, std=info.std)
  dataset = dataclasses.replace(dataset, info=own)
  evaluator = build.make_evaluator(model, dataset, config)
  if saves and evaluator.protocol.transform:
    raise UserError(
      'config.eval.save_predictions needs whole images, and'
      f' config.eval.protocol={evaluator.protocol.name} cuts them; use whole or'
      ' sliding_window'
    )
  variables = ops.cache_kernels(model, network.variables, evaluator.view_size)
  first = distributed.is_first_process()
  scores = evaluator.run(
    distributed.replicate(variables),
    keep=dataset.tally(split).num_images if first else 0,
  )
  result = {**scores.metrics, 'step': network.step}
  if first:
    step = None if config.eval.step == 'best' else network.step
    name = result_name(evaluator.description, network.trained_stride, step)
    path = workdir / 'eval' / name
    path.parent.mkdir(exist_ok=True)  # the archive needs it, too
    # All files before the first line, which nobody may be there to read.
    lines = _save_archive(path, scores) if saves else []
    if _has_labels(dataset, split):
      _warn_of_another(as_path(f'{path}.json'), network.step)
      try:
        lines += _save_metrics(path, scores, result, config.eval)
      finally:
        print_report(result)
    print(*lines, sep='\n', flush=True)
  return result


def _save_archive(path: Path, scores: Scores) -> list[str]:
  """Writes PATH.tar.gz, palette PNGs for a test server; returns its report."""
  path, info = as_path(f'{path}.tar.gz'), scores.evaluator.info
  if path.exists():
    log.warning('%s: earlier predictions are replaced', path)

  def png(index: int) -> bytes:
    return visualize.indexed_png(*info.in_file_values(scores.prediction(index)))

  pngs = ((scores.evaluator.name(i), png(i)) for i in scores.packed)
  is_voc = info.name.lower().startswith('voc2012')
  write_archive(path, pngs, 'VOC2012' if is_voc else info.name)
  return [f'{len(scores.packed)} predictions in {path}']


def _save_metrics(
  path: Path, scores: Scores, result: dict[str, Any], settings: ConfigDict
) -> list[str]:
  """Writes PATH.json, tables and pictures; returns the report about them."""
  info = scores.evaluator.info
  path.parent.mkdir(exist_ok=True)
  write_json(f'{path}.json', result)
  table = csv.writer(text := io.StringIO(newline=''))
  table.writerow(['true class', 'color', *info.classes])
  for row in zip(info.classes, info.palette, scores.confusion, strict=True):
    table.writerow([row[0], f'#{bytes(row[1]).hex()}', *row[2].tolist()])
  write(f'{path}_confusion.csv', text.getvalue())
  names = list(map(scores.evaluator.name, range(len(scores.counts))))
  rows = image_table.ImageTable(names, info.classes, scores.counts)
  image_table.write(f'{path}_images.csv', rows)
  lines = [f'metrics and pictures: {path}*']
  pictures = {
    '': scores.picture(list(scores.packed)[: settings.panels]),
    '_confusion': confusion_picture(scores.confusion, info.classes),
  }
  best = extremes(scores.mious, settings.worst_and_best)
  for kind, chosen in best.items():
    as_path(f'{path}_{kind}.png').unlink(missing_ok=True)  # of an earlier one
    if chosen:
      pictures[f'_{kind}'] = scores.picture(chosen)
      shown = [f'{names[i]} {100 * scores.mious[i]:.1f}' for i in chosen]
      lines.append(f'{kind} images by mIoU: {", ".join(shown)}')
  for ending, picture in pictures.items():
    if picture is not None:
      visualize.save_png(f'{path}{ending}.png', picture)
  return lines


def _warn_of_another(path: Path, step: int) -> None:
  before = json.loads(path.read_text())['step'] if path.exists() else step
  if before != step:
    log.warning('%s: another evaluation, of step %s, is replaced', path, before)


def score_checkpoint(
  evaluator: Evaluator,
  saved: Checkpoints,
  config: ConfigDict,
  workdir: Path,
  writer: Writer,
  progress: Progress,
  state: Any,
  *,
  stop: StopSignal,
) -> None:
  """Scores a state in training, whose checkpoint gets the metrics.

  It shows them in the logs and on the screen; of the best checkpoint so far, it
  writes the files of `evaluate`. Raises `Preempted` if a signal comes.
  """
  step, panels = int(state.step), config.eval.panels

  def between() -> None:
    if stop.requested():
      raise Preempted(stop.number, step)

  kept = panels, config.eval.worst_and_best
  scores = evaluator.run(state.variables, *kept, between)
  first = distributed.is_first_process()
  writer.text(step, 'eval_table', format_table(scores.metrics))
  numbers = log_metrics(step, scores.metrics, writer)
  shown = list(scores.packed)[:panels] if first else []
  if (picture := scores.picture(shown)) is not None:
    writer.image(step, 'eval', picture)
  line = '  '.join(f'{k} {v:.4f}' for k, v in numbers.items())
  progress.write(f'step {step}: {line}')
  saved.add_metrics(step, scores.metrics)
  if first and saved.best_step == step:
    name = result_name(evaluator.description, config.model.output_stride)
    result = {**scores.metrics, 'step': step}
    try:
      _save_metrics(workdir / 'eval' / name, scores, result, config.eval)
    except OSError as error:  # a picture ends no run
      log.warning('%s: %s; not written', error.filename, error.strerror)


def log_metrics(
  step: int, metrics: dict[str, Any], writer: Writer
) -> dict[str, float]:
  """Logs the four numbers of an evaluation, and returns them."""
  numbers = summary(metrics)
  writer.scalars(step, {f'eval_{k}': v for k, v in numbers.items()})
  return numbers


def finish(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Reports the best checkpoint; without evaluation, names the latest one."""
  scored, first = config.data.eval_split, distributed.is_first_process()
  with Checkpoints(workdir) as saved:
    if (step := saved.best_step if scored else saved.latest_step) is None:
      raise UserError(f'no checkpoint in {workdir} any more')
    metrics = saved.metrics(step)
  if not scored:
    if first:
      why = 'config.data.eval_split is empty'
      print(f'{workdir} holds step {step}, not evaluated: {why}')
    return {'step': step}
  if metrics is None:  # stopped by a signal, before its evaluation
    result = evaluate(config, workdir)
  else:
    result = {**metrics, 'step': step}
    if first:
      print_report(result)
  if first:
    write_json(workdir / 'eval.json', result)
  return result


def result_name(
  description: dict[str, Any], trained_stride: int, step: int | None = None
) -> str:
  """Names an evaluation by its split, protocol and what is not the default.

  That is the output stride of training, and of the best checkpoint no `step`.
  """
  parts = [description['split'], description['protocol']]
  if 'crop_size' in description:
    parts.append('x'.join(map(str, description['crop_size'])))
  overlap = description.get('overlap', Protocol.overlap)
  if overlap != Protocol.overlap:
    parts.append(f'overlap{overlap:g}')
  if description['output_stride'] != trained_stride:
    parts.append(f'stride{description["output_stride"]}')
  if description['scales'] != [1.0]:
    parts.append('scales' + '-'.join(f'{s:g}' for s in description['scales']))
  if description['flip']:
    parts.append('flip')
  if step is not None:
    parts.append(f'step{step}')
  return '_'.join(parts)


def _has_labels(dataset: Dataset, split: str) -> bool:
  return bool(dataset.tally(split).class_pixels.any())


def check_labels(dataset: Dataset, split: str) -> None:
  """Raises `UserError` unless the split has a pixel with a class to count."""
  if not _has_labels(dataset, split):
    raise UserError(
      f'config.data.eval_split={split} has no pixel with a class to count; for'
      ' predictions alone: --mode=eval --config.eval.save_predictions=true'
    )


def check_data(
  dataset: Dataset, trained: str, scored: str
) -> tuple[Finding, ...]:
  """Refuses labels that teach nothing; returns what is only suspect."""
  tallies = {s: dataset.tally(s) for s in (trained, scored) if s}
  suspect = check_tallies(dataset.info, tallies, trained)
  if scored:
    check_labels(dataset, scored)
    check_splits(dataset, trained, scored, refuse=True)
  return suspect


def check_splits(
  dataset: Dataset, trained: str, scored: str, *, refuse: bool = False
) -> None:
  """Warns of images that are trained on and scored, or refuses them.

  The same split in both places is meant, and only warned of.
  """
  if trained not in dataset.builders:
    return
  shared = dataset.shared_names(trained, scored)
  if refuse and shared and trained != scored:
    raise UserError(
      f'config.data.train_split={trained} and config.data.eval_split={scored}'
      f' share {len(shared)} images ({shared[0]}, ...), which makes the score'
      ' worthless; take splits that share none, or train without evaluation:'
      " config.data.eval_split=''"
    )
  if shared:
    log.warning(
      '%d images of config.data.eval_split=%s are in config.data.train_split=%s'
      ' as well: the score says little about other images',
      *(len(shared), scored, trained),
    )


def print_report(result: dict[str, Any]) -> None:
  """Prints the metrics as a table."""
  print(f'step {result["step"]}, {result["images"]} images')
  keys = 'split', 'protocol', 'output_stride', 'crop_size', 'scales', 'flip'
  # An older version did not note them all.
  print(', '.join(f'{k} {result[k]}' for k in keys if k in result))
  print(format_table(result), flush=True)
