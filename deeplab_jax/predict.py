"""Predictions for images that have no labels."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax import build
from deeplab_jax.config import to_json, with_preset
from deeplab_jax.data import buckets, images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.evaluation.evaluator import pmap_predict_step
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.visualize import labels as visualize
from deeplab_jax.weights import checkpoints

log = logging.getLogger(__name__)


def predict(
  config: ConfigDict, workdir: Path, inputs: Sequence[str]
) -> list[Path]:
  """Segments images with a checkpoint of `workdir`.

  For each image of `inputs` (files, folders or globs) it writes `NAME.png`, the
  classes as a palette PNG of the image's own size, which it returns, and
  `NAME_overlay.png`, the classes over the image with a legend. It prints the
  share of each class. Raises `UserError` without a checkpoint; at the end, for
  images it could not read.
  """
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
    place = f'config.predict.output_dir={folder}'
    raise UserError(f'{place}: {error.strerror}') from error
  targets = _targets(paths, folder)
  if earlier := sum(target.exists() for target in targets.values()):
    log.warning('%d earlier predictions in %s are replaced', earlier, folder)
  limit = config.eval.buckets if model.pads_freely else None
  unread = list(paths)
  for path, image, label in _segment(model, variables, paths, limit):
    _write(targets[path], path, image, label, info)
    unread.remove(path)
  done = len(paths) - len(unread)
  print(f'{done} images segmented by step {network.step}, in {folder}')
  if unread:
    raise UserError(
      f'{len(unread)} of {len(paths)} images could not be read, first'
      f' {unread[0]}; see above'
    )
  return list(targets.values())


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

  The images are padded to at most `limit` sizes, which their heads tell before
  the pixels are read. Those that cannot be read are named and left out.
  """
  predict_step = pmap_predict_step(model)
  sizes = {p: size for p in paths if (size := _read(images.read_size, p))}
  padded = buckets.bucket_of_each(list(sizes.values()), limit)
  room = dict(zip(sizes.values(), padded, strict=True))
  loaded = ((p, _read(images.read_image, p)) for p in sizes)
  pairs = (pair for pair in loaded if pair[1] is not None)
  devices = jax.local_device_count()
  # Images in a row that are padded to one size go to the devices together. A
  # file may say after its pixels that its image is to be turned, hence `or`.
  for (height, width), row in itertools.groupby(
    pairs, lambda pair: room.get(size := pair[1].shape[:2]) or size
  ):
    while group := list(itertools.islice(row, devices)):
      batch = {
        'image': np.zeros((devices, 1, height, width, 3), np.uint8),
        'size': np.full((devices, 1, 2), (height, width), np.int32),
      }
      for device, (_, image) in enumerate(group):
        h, w = batch['size'][device, 0] = image.shape[:2]
        batch['image'][device, 0, :h, :w] = image
      labels = distributed.unshard(predict_step(variables, batch))
      for (path, image), label in zip(group, labels, strict=False):
        yield path, image, label[: image.shape[0], : image.shape[1]]


def _read(function: Callable[[Path], Any], path: Path) -> Any:
  try:
    return function(path)
  except UserError as error:
    log.warning('%s; left out', error)
    return None


def _write(
  target: Path,
  path: Path,
  image: np.ndarray,
  label: np.ndarray,
  info: DatasetInfo,
) -> None:
  void = info.ignore_label
  visualize.save_indexed_png(target, *info.in_file_values(label))
  picture = visualize.overlay(
    image, label, info.palette, info.classes, ignore_label=void
  )
  visualize.save_png(target.with_name(f'{target.stem}_overlay.png'), picture)
  shares = visualize.class_shares(label, info.num_classes, void)
  order = np.argsort(-shares, kind='stable')
  text = [f'{info.classes[i]} {shares[i]:.1%}' for i in order if shares[i] > 0]
  print(f'{path}: {", ".join(text)}', flush=True)
