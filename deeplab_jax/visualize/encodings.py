"""Results of a network as files for other programs: PNG, JSON, npz."""

import io
import json
from typing import Any

import numpy as np

from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.visualize.labels import class_shares, indexed_png

MEDIA_TYPES = {
  'png': 'image/png',
  'json': 'application/json',
  'npz': 'application/x-npz',
}


def encode(
  kind: str,
  info: DatasetInfo,
  label: np.ndarray,
  probabilities: Any = None,
) -> bytes:
  """Encodes classes uint8 [H, W] as one of `MEDIA_TYPES`.

  'png' is the file that --mode=predict writes. 'json' has the share of each
  class that occurs, and runs of pixels of one class, row by row. 'npz' has
  `label`, and `probabilities` float32 [H, W, C].
  """
  if kind == 'png':
    return indexed_png(*info.in_file_values(label))
  if kind == 'npz':
    file = io.BytesIO()
    np.savez(file, label=label, probabilities=probabilities)
    return file.getvalue()
  shares = class_shares(label, info.num_classes, info.ignore_label).tolist()
  rows = zip(list_classes(info), shares, strict=True)
  flat = label.ravel()
  starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
  lengths = np.diff(starts, append=flat.size)
  found = {
    'height': label.shape[0],
    'width': label.shape[1],
    'classes': [{**row, 'share': share} for row, share in rows if share],
    'runs': {'class': flat[starts].tolist(), 'length': lengths.tolist()},
  }
  return json.dumps(found).encode()


def list_classes(info: DatasetInfo) -> list[dict[str, Any]]:
  """Returns what each class is called, and its value and color in a mask."""
  rows = zip(info.classes, info.values, info.palette, strict=True)
  return [
    {'class': i, 'name': name, 'value': value, 'color': f'#{bytes(rgb).hex()}'}
    for i, (name, value, rgb) in enumerate(rows)
  ]
