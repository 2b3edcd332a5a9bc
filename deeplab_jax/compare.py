"""Comparison of two evaluations of the same images, in pairs."""

import json
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.evaluation import image_table
from deeplab_jax.evaluation.image_table import ImageTable
from deeplab_jax.evaluation.metrics import MEANS, percent, rates
from deeplab_jax.evaluation.resampling import paired
from deeplab_jax.runtime.errors import UserError, first_line, require
from deeplab_jax.runtime.files import as_path, near_file, read_bytes, write_json

_END = '_images.csv'
_SAME = 'split', 'protocol', 'crop_size'  # in both evaluations
_NOTED = 'step', 'output_stride', 'overlap', 'scales', 'flip'


def compare(workdir: Path | None, inputs: Sequence[str]) -> dict[str, Any]:
  """Tests whether one of two runs is better; prints and returns what differs.

  Each of the two `inputs` is a workdir with one evaluation, or an evaluation,
  WORKDIR/eval/NAME. With a `workdir` it writes `workdir/compare.json`. Raises
  `UserError` if files are missing, or the two did not count the same pixels.
  """
  if len(inputs) != 2:
    raise UserError(
      '--mode=compare takes two workdirs, or two evaluations as'
      f' WORKDIR/eval/NAME, got {len(inputs)}'
    )
  paths = [_evaluation(place) for place in inputs]
  results, tables = zip(*map(_load, paths), strict=True)
  a, b = _aligned(paths, results, *tables)
  kinds = min(a.counts.shape[1], b.counts.shape[1])
  mious = zip(a.mious, b.mious, strict=True)
  found = {
    'a': str(paths[0]),
    'b': str(paths[1]),
    **{key: results[0][key] for key in _SAME if key in results[0]},
    'images': len(a.names),
    'classes': a.classes,
    **paired(np.stack([a.counts[:, :kinds], b.counts[:, :kinds]], 1)),
    'per_image_miou': dict(zip(a.names, mious, strict=True)),
  }
  if workdir is not None:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / 'compare.json', found)
  for letter, path, of in zip('AB', paths, results, strict=True):
    noted = (f'{key} {of[key]}' for key in _NOTED if key in of)
    print(f'{letter} is {path}: {", ".join(noted)}')
  print(*_table(found), *_words(found), sep='\n', flush=True)
  return found


def _evaluation(place: str) -> Path:
  """Returns WORKDIR/eval/NAME of a place that was typed."""
  path = as_path(place)
  if path.is_dir():
    files = sorted((path / 'eval').glob(f'*{_END}'))
    names = [str(file).removesuffix(_END) for file in files]
    if len(names) > 1:
      several = ' or '.join(names)
      raise UserError(f'{place} holds several evaluations; name one: {several}')
    place = names[0] if names else str(path / 'eval' / 'val_whole')
  path = as_path(place.removesuffix(_END).removesuffix('.json'))
  for ending in (_END, '.json'):
    if not (file := as_path(f'{path}{ending}')).exists():
      raise UserError(
        f'{file}: no such file{near_file(file)}; to write it: --mode=eval'
        f' --workdir={path.parent.parent}'
      )
  return path


def _load(path: Path) -> tuple[dict[str, Any], ImageTable]:
  """Reads PATH.json and PATH_images.csv, which one evaluation wrote."""
  file = as_path(f'{path}.json')
  table = image_table.read(as_path(f'{path}{_END}'))
  try:
    result = json.loads(read_bytes(file))
    far = rates(table.counts.sum(0))['miou'] - result['miou']
    require(abs(far) < 1e-9, f'mIoU must be that of {path.name}{_END}', far)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{file}: {first_line(error)}; --mode=eval writes both again'
    ) from error
  return result, table


def _aligned(
  paths: Sequence[Path],
  results: Sequence[dict[str, Any]],
  a: ImageTable,
  b: ImageTable,
) -> tuple[ImageTable, ImageTable]:
  """Brings both into one order; refuses those that counted other pixels."""

  def same(what: str, first: Any, second: Any) -> None:
    if first != second:
      raise UserError(
        f'{paths[0]} and {paths[1]} cannot be compared: {what} {first} in the'
        f' first, {second} in the second; evaluate both on the same images'
      )

  for key in _SAME:
    same(key, *(of.get(key) for of in results))
  for pair in zip_longest(a.classes, b.classes):
    same('class', *pair)
  for pair in zip_longest(sorted(a.names), sorted(b.names)):
    same('image', *pair)
  rows = {name: row for row, name in enumerate(b.names)}
  order = [rows[name] for name in a.names]
  mious = [b.mious[row] for row in order]
  b = ImageTable(a.names, b.classes, b.counts[order], mious)
  truths = [of.counts[:, 0] + of.counts[:, 2] for of in (a, b)]
  for row, column in np.argwhere(truths[0] != truths[1])[:1]:
    pixels = (truth[row, column] for truth in truths)
    same(f'in {a.names[row]}, pixels of {a.classes[column]}:', *pixels)
  return a, b


def _table(found: dict[str, Any]) -> list[str]:
  """The lines of a table of all measures."""
  rows = {name: found[key] for key, name in MEANS.items() if key in found}
  for i, name in enumerate(found['classes']):
    of_class = found['per_class_iou'].items()
    rows[f'IoU of {name}'] = {key: x[..., i] for key, x in of_class}
  width = max(map(len, rows))
  head = f'{"":{width}}  {"A":>7}  {"B":>7}  {"B - A":>8}'
  head += f'  {"95 % interval":>18}  {"p":>6}'
  noted = [f'{key} {found[key]}' for key in (*_SAME, 'images') if key in found]
  lines = [', '.join(noted), head, '-' * len(head)]
  for name, of in rows.items():
    low, high = of['interval_95']
    cells = (
      f'{of["a"]:7.2%}  {of["b"]:7.2%}  {of["difference"]:+8.2%}'
      f'  {low:+7.2%} to {high:+7.2%}  {of["p"]:6.4f}'
    )
    cells = re.sub(r'[+ ]*nan%?', lambda x: f'{"-":>{len(x[0])}}', cells)
    lines.append(f'{name:{width}}  {cells}')
  return [*lines, '-' * len(head)]


def _words(found: dict[str, Any]) -> list[str]:
  """What the numbers mean, and the images that differ most."""
  change, p = found['miou']['difference'], found['miou']['p']
  verdict = f'{"A" if change < 0 else "B"} is better'
  if not p < 0.05:
    verdict = 'The difference is not significant and may be chance'
  rows = [(b - a, n, a, b) for n, (a, b) in found['per_image_miou'].items()]
  rows = [row for row in rows if not np.isnan(row[0])]
  wins, losses = (sum(s * row[0] > 0 for row in rows) for s in (1, -1))
  most = sorted(rows, key=lambda row: -abs(row[0]))[:5]
  shown = (f'{name} {percent(a)} to {percent(b)}' for _, name, a, b in most)
  return [
    f'{verdict}: mIoU {100 * change:+.2f} points, p = {p:.4f}.',
    f'B is better on {wins} images, A on {losses}, by the mIoU of each.',
    f'Images that differ most: {", ".join(shown)}',
  ]
