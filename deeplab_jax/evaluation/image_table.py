"""What an evaluation counted in every image, as a CSV file."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deeplab_jax.evaluation.metrics import COUNTS
from deeplab_jax.runtime.errors import UserError, first_line, require
from deeplab_jax.runtime.files import read_bytes, replacing

_FIRST = 'image', 'valid_pixels', 'per_image_miou', 'per_image_pixel_accuracy'


class ImageTable(NamedTuple):
  """N images with the integers that all measures are made of."""

  names: Sequence[str]
  classes: Sequence[str]
  counts: np.ndarray  # int64 [N, K, C], `metrics.COUNTS`
  mious: Sequence[float]  # `per_image_miou`; NaN without a valid pixel


def write(path: str | os.PathLike, table: ImageTable) -> None:
  """Writes a line for each image, with columns as `tp:CLASS` for its counts."""
  names, classes, counts, mious = table
  pixels = counts[:, 0].sum(-1), (counts[:, 0] + counts[:, 2]).sum(-1)
  with (
    replacing(path) as temporary,
    open(temporary, 'w', newline='', encoding='utf-8') as file,
  ):
    writer = csv.writer(file)
    writer.writerow(_header(classes, counts.shape[1]))
    for name, right, valid, miou, of in zip(
      names, *pixels, mious, counts, strict=True
    ):
      shares = (miou, right / valid) if valid else ('', '')
      writer.writerow([name, valid, *shares, *of.T.ravel().tolist()])


def read(path: Path) -> ImageTable:
  """Reads what `write` wrote; raises `UserError` for anything else."""
  try:
    text = read_bytes(path, 2**30).decode()
    head, *rows = csv.reader(io.StringIO(text, newline=''), strict=True)
    first = len(_FIRST)
    kinds = len({column.partition(':')[0] for column in head[first:]})
    classes = [column.partition(':')[2] for column in head[first::kinds]]
    require(head == _header(classes, kinds), 'columns must be known', head[:9])
    names = [row[0] for row in rows]
    require(0 < len(set(names)) == len(names), 'names must differ', names[:9])
    mious = [float(row[2] or 'nan') for row in rows]
    counts = np.array([row[first:] for row in rows]).astype(np.int64)
    counts = counts.reshape(len(rows), len(classes), kinds).swapaxes(1, 2)
  except (ValueError, IndexError, OverflowError, csv.Error) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'{path}: {first_line(error)}; --mode=eval writes it again'
    ) from error
  return ImageTable(names, classes, counts, mious)


def _header(classes: Sequence[str], kinds: int) -> list[str]:
  columns = (f'{kind}:{name}' for name in classes for kind in COUNTS[:kinds])
  return [*_FIRST, *columns]
