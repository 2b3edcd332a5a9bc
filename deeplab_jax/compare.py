"""Comparison of two evaluations of the same images, in pairs."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.evaluation import image_table
from deeplab_jax.evaluation.image_table import ImageTable
from deeplab_jax.evaluation.metrics import MEANS
from deeplab_jax.evaluation.resampling import paired
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import as_path, near_file

_END = '_images.csv'


def compare(inputs: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
  """Tests whether one of two runs is better; prints and returns `paired`.

  Each of the two `inputs` is a workdir with one evaluation, or an evaluation,
  WORKDIR/eval/NAME. Raises `UserError` if its table of images is missing, or
  the two did not count the same pixels.
  """
  if len(inputs) != 2:
    raise UserError(
      '--mode=compare takes two workdirs, or two evaluations as'
      f' WORKDIR/eval/NAME, got {len(inputs)}'
    )
  paths = [_table_of(place) for place in inputs]
  a, b = map(image_table.read, paths)
  found = paired(_aligned(paths, a, b))
  rows = {name: found[key] for key, name in MEANS.items() if key in found}
  for i, name in enumerate(a.classes):
    of_class = found['per_class_iou'].items()
    rows[f'IoU of {name}'] = {key: x[..., i] for key, x in of_class}
  change, p = found['miou']['difference'], found['miou']['p']
  verdict = f'{"A" if change < 0 else "B"} is better'
  if not p < 0.05:
    verdict = 'The difference is not significant and may be chance'
  for letter, path in zip('AB', paths, strict=True):
    print(f'{letter} is {str(path).removesuffix(_END)}')
  print(f'{len(a.names)} images', *_lines(rows), sep='\n')
  print(f'{verdict}: mIoU {100 * change:+.2f} points, p = {p:.4f}.', flush=True)
  return found


def _table_of(place: str) -> Path:
  """Returns WORKDIR/eval/NAME_images.csv of a place that was typed."""
  hint, path = '', as_path(place)
  if path.is_dir():
    hint = f'; to write it: --mode=eval --workdir={place}'
    names = [str(x) for x in sorted((path / 'eval').glob(f'*{_END}'))]
    if len(names) > 1:
      several = ' or '.join(name.removesuffix(_END) for name in names)
      raise UserError(f'{place} holds several evaluations; name one: {several}')
    place = names[0] if names else str(path / 'eval' / 'val_whole')
  name = place.removesuffix(_END).removesuffix('.json')
  if not (path := as_path(f'{name}{_END}')).exists():
    raise UserError(f'{path}: no such file{hint or near_file(path)}')
  return path


def _aligned(paths: Sequence[Path], a: ImageTable, b: ImageTable) -> np.ndarray:
  """Counts [N, 2, K, C] of both; refuses those that counted other pixels."""

  def same(what: str, first: Any, second: Any) -> None:
    if first != second:
      raise UserError(
        f'{paths[0]} and {paths[1]} cannot be compared: {what} {first} in the'
        f' first, {second} in the second; evaluate both on the same images'
      )

  for pair in zip_longest(a.classes, b.classes):
    same('class', *pair)
  for pair in zip_longest(sorted(a.names), sorted(b.names)):
    same('image', *pair)
  rows = {name: row for row, name in enumerate(b.names)}
  tables = a.counts, b.counts[[rows[name] for name in a.names]]
  kinds = min(table.shape[1] for table in tables)
  counts = np.stack([table[:, :kinds] for table in tables], 1)
  truth = counts[:, :, 0] + counts[:, :, 2]
  for row, column in np.argwhere(truth[:, 0] != truth[:, 1])[:1]:
    what = f'in {a.names[row]}, pixels of {a.classes[column]}:'
    same(what, *truth[row, :, column])
  return counts


def _lines(rows: dict[str, dict[str, np.ndarray]]) -> list[str]:
  """The lines of a table of measures."""
  width = max(map(len, rows))
  head = f'{"":{width}}  {"A":>7}  {"B":>7}  {"B - A":>8}'
  head += f'  {"95 % interval":>18}  {"p":>6}'
  lines = [head, '-' * len(head)]
  for name, of in rows.items():
    low, high = of['interval_95']
    cells = (
      f'{of["a"]:7.2%}  {of["b"]:7.2%}  {of["difference"]:+8.2%}'
      f'  {low:+7.2%} to {high:+7.2%}  {of["p"]:6.4f}'
    )
    cells = re.sub(r'[+ ]*nan%?', lambda x: f'{"-":>{len(x[0])}}', cells)
    lines.append(f'{name:{width}}  {cells}')
  return [*lines, lines[1]]
