"""Evaluation of a checkpoint over a whole split."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from deeplab_jax import build
from deeplab_jax.config import to_json, with_preset
from deeplab_jax.data.load import Dataset
from deeplab_jax.evaluation import metrics
from deeplab_jax.evaluation.evaluator import (
  Evaluator,
  ScoredImage,
  write_archive,
)
from deeplab_jax.evaluation.protocols import Protocol, in_words
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.training.writers import write_json
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.visualize.figures import confusion_picture
from deeplab_jax.weights import checkpoints

log = logging.getLogger(__name__)


def evaluate_variables(
  evaluator: Evaluator,
  variables: dict[str, Any],
  panels: int,
  visit: Sequence[Callable[[ScoredImage], None]] = (),
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
  """Counts every pixel of a split once.

  Args:
    evaluator: of the split.
    variables: `params` and `batch_stats`, prepared or not, on the devices.
    panels: how many images the picture shows.
    visit: called with each image.

  Returns:
    The measures over the whole set and those averaged over images with the
    number of `images` and the protocol; the confusion matrix int64 [C, C]; and
    a picture of the first images (image, label and prediction).
  """
  classes = evaluator.info.classes
  confusion = np.zeros((len(classes), len(classes)), np.int64)
  of_images, shown = {}, {}
  for scored in evaluator.scored(variables):
    confusion += scored.confusion
    of_images[scored.index] = scored.measures
    if scored.index < panels:
      shown[scored.index] = scored.prediction
    for call in visit:
      call(scored)
  # In the order of the records: equal for any batches.
  rows = [of_images[index] for index in sorted(of_images)]
  measures = {
    **metrics.measures(confusion, classes),
    **metrics.average(rows),
    **evaluator.description,
    'images': len(rows),
  }
  picture = evaluator.picture(dict(sorted(shown.items())))
  return measures, confusion, picture


class _Extremes:
  """The images of the lowest and the highest mIoU, each with its prediction."""

  def __init__(self, count: int) -> None:
    self._count = count
    self.worst: list[tuple[float, int, np.ndarray]] = []
    self.best: list[tuple[float, int, np.ndarray]] = []

  def add(self, scored: ScoredImage) -> None:
    miou = scored.measures['per_image_miou']
    if np.isnan(miou):
      return
    entry = (miou, scored.index, scored.prediction)
    self.worst = sorted([*self.worst, entry])[: self._count]
    best = sorted([*self.best, entry], key=lambda e: (-e[0], e[1]))
    self.best = best[: self._count]

  def save(self, evaluator: Evaluator, path: Path) -> list[str]:
    """Writes PATH_worst.png and PATH_best.png; returns a line for each."""
    lines = []
    for kind, entries in (('worst', self.worst), ('best', self.best)):
      picture = evaluator.picture({index: map_ for _, index, map_ in entries})
      if picture is not None:
        visualize.save_png(_beside(path, f'_{kind}.png'), picture)
        names = [f'{evaluator.name(i)} {100 * m:.1f}' for m, i, _ in entries]
        lines.append(f'{kind} images by mIoU: {", ".join(names)}')
    return lines


class _Archive:
  """Predictions as palette PNGs for a test server."""

  def __init__(self, evaluator: Evaluator) -> None:
    self._evaluator = evaluator
    self._pngs: dict[int, bytes] = {}

  def add(self, scored: ScoredImage) -> None:
    info = self._evaluator.info
    self._pngs[scored.index] = visualize.indexed_png(
      *info.in_file_values(scored.prediction)
    )

  def save(self, path: Path) -> str:
    """Writes the archive; returns a line that says where."""
    if path.exists():
      log.warning('%s: earlier predictions are replaced', path)
    name = self._evaluator.info.name
    write_archive(
      path,
      ((self._evaluator.name(i), png) for i, png in sorted(self._pngs.items())),
      'VOC2012' if name.lower().startswith('voc2012') else name,
    )
    return f'{len(self._pngs)} predictions in {path}'


def evaluate(
  config: ml_collections.ConfigDict, workdir: Path
) -> dict[str, Any]:
  """Evaluates a checkpoint of `workdir`.

  It prints the measures, and writes them into the folder `eval` with pictures:
  NAME.json, NAME.png (the first images), NAME_confusion.png, NAME_worst.png and
  NAME_best.png. NAME is made of the split, the protocol and what else differs
  from the usual, as `val_whole` or `val_whole_flip_step300`. With
  `config.eval.save_predictions` there is the archive NAME.tar.gz, which for a
  split without labels is all.

  Returns:
    What NAME.json holds: what `evaluate_variables` gives, and `step`.

  Raises:
    UserError: if the checkpoint or the data cannot be used.
  """
  split, saves = config.data.eval_split, config.eval.save_predictions
  _check(config)
  dataset = build.open_dataset(config, split)
  _warn_of_trained(dataset, config.data.train_split, split)
  if not saves:
    check_labels(dataset, split)
  network = checkpoints.open_network(
    workdir, config.eval.step, to_json(config)['model'], dataset.info.to_json()
  )
  config = with_preset(config, network.model['preset'])
  model = build.make_model(config, dataset.info.num_classes)
  evaluator = build.make_evaluator(model, dataset, config)
  extremes = _Extremes(config.eval.worst_and_best)
  first = distributed.is_first_process()
  archive = _Archive(evaluator) if saves and first else None
  measures, confusion, picture = evaluate_variables(
    evaluator,
    distributed.replicate(evaluator.prepare(network.variables)),
    config.eval.panels,
    [extremes.add, *([archive.add] if archive else [])],
  )
  result = {**measures, 'step': network.step}
  if first:
    folder = workdir / 'eval'
    folder.mkdir(exist_ok=True)
    path = folder / result_name(
      evaluator.description,
      trained_stride=network.trained_stride,
      step=None if config.eval.step == 'best' else network.step,
    )
    # All files before the first line, which nobody may be there to read.
    lines = []
    if archive:
      lines.append(archive.save(_beside(path, '.tar.gz')))
    if _has_labels(dataset, split):
      matrix = confusion_picture(confusion, evaluator.info.classes)
      pictures = {'': picture, '_confusion': matrix}
      lines += _save_measures(path, result, pictures)
      lines += extremes.save(evaluator, path)
      print_report(result)
    for line in lines:
      print(line, flush=True)
  return result


def _save_measures(
  path: Path, result: dict[str, Any], pictures: dict[str, np.ndarray | None]
) -> list[str]:
  """Writes PATH.json and the pictures, by what is added to PATH."""
  _warn_of_replaced(_beside(path, '.json'), result)
  write_json(_beside(path, '.json'), result)
  for ending, picture in pictures.items():
    if picture is not None:
      visualize.save_png(_beside(path, f'{ending}.png'), picture)
  return [f'measures and pictures: {path}*']


def result_name(
  description: dict[str, Any], *, trained_stride: int, step: int | None = None
) -> str:
  """Names an evaluation so that another one has another name.

  Args:
    description: of split and protocol, see `Evaluator`.
    trained_stride: the output stride of training.
    step: of the checkpoint, None for the best one.

  Returns:
    The split, the protocol, and what differs from the usual.
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


def _warn_of_replaced(path: Path, result: dict[str, Any]) -> None:
  """Tells of an earlier evaluation that may not be repeatable any more."""
  if not path.exists():
    return
  try:
    before = json.loads(path.read_text())
  except (OSError, ValueError):
    before = {}
  # As it reads when it is written and read.
  if before != json.loads(json.dumps(result)):
    step = before.get('step', '?')
    log.warning('%s: another evaluation, of step %s, is replaced', path, step)


def _beside(path: Path, ending: str) -> Path:
  # Not `with_suffix`: a name may have dots.
  return path.with_name(path.name + ending)


def _has_labels(dataset: Dataset, split: str) -> bool:
  return bool(dataset.tally(split).class_pixels.any())


def check_labels(dataset: Dataset, split: str) -> None:
  """Raises `UserError` unless there is something to measure."""
  if not _has_labels(dataset, split):
    raise UserError(
      f'config.data.eval_split={split} has no pixel with a class to count; for'
      ' predictions alone: --mode=eval --config.eval.save_predictions=true'
    )


def _warn_of_trained(dataset: Dataset, trained: str, scored: str) -> None:
  """Tells of images trained on, where the data set holds both splits."""
  if trained in dataset.builders:
    shared = dataset.shared_names(trained, scored)
    if shared:
      log.warning(
        '%d images of config.data.eval_split=%s are in config.data.train_split'
        '=%s as well: the score says little about other images',
        len(shared),
        scored,
        trained,
      )


def _check(config: ml_collections.ConfigDict) -> None:
  if not config.data.eval_split:
    raise UserError(
      'config.data.eval_split is empty, as for training without evaluation;'
      ' name a split: --config.data.eval_split=val'
    )
  if config.eval.save_predictions and config.eval.protocol == 'center_crop':
    raise UserError(
      'config.eval.save_predictions needs whole images, and'
      ' config.eval.protocol=center_crop cuts them; use whole or sliding_window'
    )


def print_report(result: dict[str, Any]) -> None:
  """Prints the measures as a table, on the first process alone."""
  if not distributed.is_first_process():
    return
  print(f'step {result["step"]}, {result["images"]} images')
  if 'protocol' in result:  # not where an older version evaluated
    print(f'{result["split"]}: {in_words(result)}')
  print(metrics.format_table(result), flush=True)
