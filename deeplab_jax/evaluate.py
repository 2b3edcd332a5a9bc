"""Evaluation of a checkpoint over a whole split."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from deeplab_jax import checkpoints, distributed, metrics, steps, visualize
from deeplab_jax.config import dataset_arguments, with_preset
from deeplab_jax.data.load import Dataset, load_dataset
from deeplab_jax.data.pipeline import make_eval_iterator
from deeplab_jax.errors import UserError, naming
from deeplab_jax.models.deeplab import deeplab_v3
from deeplab_jax.writers import write_json

log = logging.getLogger(__name__)


def open_dataset(config: ml_collections.ConfigDict, *splits: str) -> Dataset:
  """The data set of `config.data`, prepared, with at least these splits."""
  named = tuple(dict.fromkeys(filter(None, splits)))
  return load_dataset(**dataset_arguments(config), splits=named)


def evaluate_variables(
  eval_step: Callable[..., Any],
  variables: dict[str, Any],
  dataset: Dataset,
  config: ml_collections.ConfigDict,
  size: tuple[int, int],
) -> tuple[dict[str, Any], np.ndarray | None]:
  """Counts every pixel of the evaluation split once.

  Args:
    eval_step: from `steps.pmap_eval_step`.
    variables: `params` and `batch_stats`, on the devices.
    dataset: holds the split.
    config: of the run.
    size: (height, width) to which all images are padded with void.

  Returns:
    The measures with the number of `images`, and a picture of the first ones
    (image, label and prediction), uint8 [H, W, 3].
  """
  split, info = config.data.eval_split, dataset.info
  devices = jax.device_count()
  iterator = make_eval_iterator(
    dataset.source(split),
    size=size,
    ignore_label=info.ignore_label,
    batch_size=-(-config.eval.batch_size // devices) * jax.local_device_count(),
    host=jax.process_index(),
    hosts=jax.process_count(),
    threads=config.data.threads,
  )
  confusion = np.zeros((info.num_classes, info.num_classes), np.int64)
  rows, pending = [], None
  for batch in iterator:
    device_batch = distributed.shard(
      {'image': batch['image'], 'label': batch['label']}
    )
    counts, predictions = eval_step(variables, device_batch)
    if len(rows) < config.eval.panels:
      rows += _panel_rows(batch, distributed.unshard(predictions))
    # Fetched one batch late, so that the devices never wait for the host.
    if pending is not None:
      confusion += np.asarray(jax.device_get(pending))
    pending = counts
  iterator.close()
  confusion += np.asarray(jax.device_get(pending))
  measures = metrics.measures(confusion, info.classes)
  if measures['miou'] is None:
    raise UserError(
      f'config.data.eval_split={split} has no pixel with a class to count'
    )
  measures['images'] = dataset.tally(split).num_images
  rows = rows[: config.eval.panels]
  picture = None
  if rows:
    picture = visualize.panel(
      *zip(*rows, strict=True), info.palette, info.ignore_label
    )
  return measures, picture


def _panel_rows(
  batch: dict[str, np.ndarray], predictions: np.ndarray
) -> list[tuple[np.ndarray, ...]]:
  """Image, label and prediction of each record, without its padding."""
  maps = (batch['image'], batch['label'], predictions)
  return [
    tuple(m[row, :height, :width] for m in maps)
    for row, (height, width) in enumerate(batch['size'])
    if batch['valid'][row]
  ]


def evaluate(
  config: ml_collections.ConfigDict, workdir: Path
) -> dict[str, Any]:
  """Evaluates a checkpoint of `workdir`; prints and writes `eval.json`.

  Returns:
    What is written: the measures of `metrics.measures`, `images` and `step`.

  Raises:
    UserError: if the checkpoint or the data cannot be used.
  """
  if not config.data.eval_split:
    raise UserError(
      'config.data.eval_split is empty, as for training without evaluation;'
      ' name a split: --config.data.eval_split=val'
    )
  dataset = open_dataset(config, config.data.eval_split)
  with checkpoints.Checkpoints(workdir) as saved:
    step = saved.step_named(config.eval.step)
    metadata = saved.metadata(step)
    config = with_preset(config, checkpoints.preset_of(metadata))
    checkpoints.check_same_architecture(
      metadata,
      checkpoints.describe(config.model.to_dict(), dataset.info.to_json()),
      workdir,
    )
    variables = saved.restore_variables(step)
  with naming('config.model'):
    model = deeplab_v3(num_classes=dataset.info.num_classes, **config.model)
  measures, picture = evaluate_variables(
    make_eval_step(model, dataset),
    distributed.replicate(variables),
    dataset,
    config,
    model.padded_size(dataset.tally(config.data.eval_split).max_size),
  )
  result = {**measures, 'step': step}
  report(result, workdir)
  if picture is not None and distributed.is_first_process():
    visualize.save_png(workdir / 'eval.png', picture)
  return result


def make_eval_step(model: Any, dataset: Dataset) -> Callable[..., Any]:
  """The pmapped evaluation step for a model and the classes of a data set."""
  return steps.pmap_eval_step(
    model=model,
    num_classes=dataset.info.num_classes,
    ignore_label=dataset.info.ignore_label,
  )


def report(result: dict[str, Any], workdir: Path) -> None:
  """Prints the measures as a table and writes them to `eval.json`."""
  if not distributed.is_first_process():
    return
  write_json(workdir / 'eval.json', result)
  print(f'step {result["step"]}, {result["images"]} images')
  print(metrics.format_table(result), flush=True)
