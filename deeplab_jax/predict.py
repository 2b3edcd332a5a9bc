"""Predictions for images that have no labels."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np

from deeplab_jax import build
from deeplab_jax.config import to_json, with_preset
from deeplab_jax.data import buckets, images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.evaluation import evaluator
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.weights import checkpoints

log = logging.getLogger(__name__)

_T = TypeVar('_T')


def predict(
  config: ml_collections.ConfigDict, workdir: Path, inputs: Sequence[str]
) -> list[Path]:
  """Segments images with a checkpoint of `workdir`.

  For each image it writes `NAME.png`, the class indices as a palette PNG of the
  image's own size, and `NAME_overlay.png`, the classes over the image with a
  legend, and prints the share of each class.

  Args:
    config: of the run.
    workdir: holds the checkpoints.
    inputs: files, folders or globs.

  Returns:
    The palette PNGs, in the order of the images.

  Raises:
    UserError: if there is no checkpoint; and at the end, with all others done,
      if an image could not be read.
  """
  if not inputs:
    raise UserError(
      'no image given; name files, folders or globs after the options'
    )
  paths = images.list_images(inputs)
  network = checkpoints.open_network(
    workdir, config.eval.step, to_json(config)['model']
  )
  variables = distributed.replicate(network.variables)
  # Only now: all processes restore together.
  if not distributed.is_first_process():
    return []
  info = DatasetInfo.from_json(network.dataset)
  config = with_preset(config, network.model['preset'])
  model = build.make_model(config, info.num_classes)
  folder = Path(config.predict.output_dir or workdir / 'predictions')
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'config.predict.output_dir={folder}: {error.strerror}'
    ) from error
  targets = _targets(paths, folder)
  earlier = sum(target.exists() for target in targets.values())
  if earlier:
    log.warning('%d earlier predictions in %s are replaced', earlier, folder)
  limit = config.eval.buckets if model.pads_freely else None
  written = []
  for path, image, label in _segment(model, variables, paths, limit):
    _write(targets[path], path, image, label, info)
    written.append(targets[path])
  if written:
    print(
      f'{len(written)} images segmented by step {network.step}, in {folder}'
    )
  done = set(written)
  unread = [path for path in paths if targets[path] not in done]
  if unread:
    raise UserError(
      f'{len(unread)} of {len(paths)} images could not be read, first'
      f' {unread[0]}; see above'
    )
  return written


def _targets(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
  """Where each image's result goes; equal names are told apart by a number."""
  targets = {}
  # No result takes the place of a picture.
  taken = {p.stem for p in paths if p.parent.resolve() == folder.resolve()}
  for path in paths:
    name, number = path.stem, 1
    while name in taken or f'{name}_overlay' in taken:
      number += 1
      name = f'{path.stem}_{number}'
    taken |= {name, f'{name}_overlay'}
    targets[path] = folder / f'{name}.png'
  return targets


def _segment(
  model: DeepLabV3,
  variables: dict[str, Any],
  paths: Sequence[Path],
  limit: int | None,
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
  """Yields path, image [H, W, 3] and classes [H, W], in the order of the paths.

  The images are padded to at most `limit` sizes; those that cannot be read are
  named and left out.
  """
  predict_step = evaluator.pmap_predict_step(model=model)
  sizes = {
    path: size for path in paths if (size := _read(path, images.read_size))
  }
  fitting = buckets.bucket_of_each(list(sizes.values()), limit)
  padded = dict(zip(sizes, fitting, strict=True))
  read = (
    (path, image)
    for path in sizes
    if (image := _read(path, images.read_image)) is not None
  )

  def room(pair: tuple[Path, np.ndarray]) -> tuple[int, int]:
    path, image = pair
    size = image.shape[:2]
    # A file may say after its pixels that it is to be turned.
    return padded[path] if size == sizes[path] else size

  devices = jax.local_device_count()
  # Images in a row that are padded to one size go to the devices together.
  for size, run in itertools.groupby(read, room):
    while group := list(itertools.islice(run, devices)):
      yield from _segment_group(predict_step, variables, group, size)


def _read(path: Path, function: Callable[[Path], _T]) -> _T | None:
  try:
    return function(path)
  except UserError as error:
    log.warning('%s; left out', error)
    return None


def _segment_group(
  predict_step: Any,
  variables: dict[str, Any],
  group: Sequence[tuple[Path, np.ndarray]],
  size: tuple[int, int],
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
  devices = jax.local_device_count()
  batch = {
    'image': np.zeros((devices, 1, *size, 3), np.uint8),
    'size': np.full((devices, 1, 2), size, np.int32),
  }
  for row, (_, image) in enumerate(group):
    height, width = batch['size'][row, 0] = image.shape[:2]
    batch['image'][row, 0, :height, :width] = image
  labels = distributed.unshard(predict_step(variables, batch))
  for (path, image), label in zip(group, labels, strict=False):
    yield path, image, label[: image.shape[0], : image.shape[1]]


def _write(
  target: Path,
  path: Path,
  image: np.ndarray,
  label: np.ndarray,
  info: DatasetInfo,
) -> None:
  visualize.save_indexed_png(target, *info.in_file_values(label))
  visualize.save_png(
    target.with_name(f'{target.stem}_overlay.png'),
    visualize.overlay(
      image, label, info.palette, info.classes, ignore_label=info.ignore_label
    ),
  )
  shares = visualize.class_shares(label, info.num_classes, info.ignore_label)
  order = np.argsort(-shares, kind='stable')
  text = ', '.join(
    f'{info.classes[i]} {shares[i]:.1%}' for i in order if shares[i] > 0
  )
  print(f'{path}: {text}', flush=True)
