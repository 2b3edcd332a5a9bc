"""What an evaluation counted in every image, as a CSV file."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deeplab_jax.evaluation.metrics import COUNTS, image_metrics
from deeplab_jax.runtime import files
from deeplab_jax.runtime.errors import UserError, first_line, require

_SHARES = 'per_image_miou', 'per_image_pixel_accuracy'
_FIRST = 'image', 'valid_pixels', *_SHARES


class ImageTable(NamedTuple):
  """N images with the integers that all measures are made of."""

  names: Sequence[str]
  classes: Sequence[str]
  counts: np.ndarray  # int64 [N, K, C], `metrics.COUNTS`


def write(path: str | os.PathLike, table: ImageTable) -> None:
  """Writes a line for each image, with columns as `tp:CLASS` for its counts."""
  counts, measured = table.counts, image_metrics(table.counts)
  valid = (counts[:, 0] + counts[:, 2]).sum(-1).tolist()
  writer = csv.writer(text := io.StringIO(newline=''))
  writer.writerow(_header(table.classes, counts.shape[1]))
  for i, name in enumerate(table.names):
    shares = [measured[key][i] if valid[i] else '' for key in _SHARES]
    writer.writerow([name, valid[i], *shares, *counts[i].T.ravel().tolist()])
  files.write(path, text.getvalue())


def read(path: Path) -> ImageTable:
  """Reads what `write` wrote; raises `UserError` for anything else."""
  data, first = files.read_bytes(path, 2**30), len(_FIRST)
  try:
    text = io.StringIO(data.decode(), newline='')
    head, *rows = csv.reader(text, strict=True)
    kinds = len({column.partition(':')[0] for column in head[first:]})
    classes = [column.partition(':')[2] for column in head[first::kinds]]
    require(head == _header(classes, kinds), 'columns must be known', head[:9])
    names = [row[0] for row in rows]
    require(0 < len(set(names)) == len(names), 'names must differ', names[:9])
    counts = np.array([row[first:] for row in rows]).astype(np.int64)
    counts = counts.reshape(len(rows), len(classes), kinds).swapaxes(1, 2)
  except (ValueError, IndexError, OverflowError, csv.Error) as error:
    raise UserError(
      f'{path}: {first_line(error)}; --mode=eval writes it again'
    ) from error
  return ImageTable(names, classes, counts)


def _header(classes: Sequence[str], kinds: int) -> list[str]:
  columns = (f'{kind}:{name}' for name in classes for kind in COUNTS[:kinds])
  return [*_FIRST, *columns]
