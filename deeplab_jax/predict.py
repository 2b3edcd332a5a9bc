"""Predictions for images that have no labels."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from deeplab_jax import checkpoints, distributed, steps, visualize
from deeplab_jax.data import images
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.transforms import pad_to
from deeplab_jax.errors import UserError, naming
from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3

log = logging.getLogger(__name__)


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
    UserError: if there is no checkpoint or no readable image.
  """
  if not inputs:
    raise UserError(
      'no image given; name files, folders or globs behind the options'
    )
  paths = images.list_images(inputs)
  network = checkpoints.open_network(
    workdir, config.eval.step, config.model.to_dict()
  )
  variables = distributed.replicate(network.variables)
  # Only now: all processes restore together.
  if not distributed.is_first_process():
    return []
  info = DatasetInfo.from_json(network.dataset)
  with naming('config.model'):
    model = deeplab_v3(num_classes=info.num_classes, **network.model)
  folder = Path(config.predict.output_dir or workdir / 'predictions')
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'config.predict.output_dir={folder}: {error.strerror}'
    ) from error
  targets = _targets(paths, folder)
  written = []
  for path, image, label in _segment(model, variables, paths):
    _write(targets[path], path, image, label, info)
    written.append(targets[path])
  if not written:
    raise UserError(
      f'{paths[0]}: neither this nor another of {len(paths)} images could be'
      ' read'
    )
  of = f' of {len(paths)}' if len(written) < len(paths) else ''
  print(
    f'{len(written)}{of} images segmented by step {network.step}, in {folder}'
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
  model: DeepLabV3, variables: dict[str, Any], paths: Sequence[Path]
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
  """Yields path, image [H, W, 3] and classes [H, W], a device group a time."""
  predict_step = steps.pmap_predict_step(model=model)
  devices = jax.local_device_count()
  group: list[tuple[Path, np.ndarray]] = []
  size = None
  for path in [*paths, None]:
    image = None
    if path is not None:
      try:
        image = images.read_image(path)
      except UserError as error:
        log.warning('%s; left out', error)
        continue
    own = None if image is None else model.padded_size(image.shape[:2])
    if group and (own != size or len(group) == devices):
      yield from _segment_group(predict_step, variables, group, size)
      group = []
    size = own
    if image is not None:
      group.append((path, image))


def _segment_group(
  predict_step: Any,
  variables: dict[str, Any],
  group: list[tuple[Path, np.ndarray]],
  size: tuple[int, int],
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
  batch = np.zeros((jax.local_device_count(), 1, *size, 3), np.uint8)
  for row, (_, image) in enumerate(group):
    label = np.zeros(image.shape[:2], np.uint8)
    batch[row, 0] = pad_to(image, label, size)[0]
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
