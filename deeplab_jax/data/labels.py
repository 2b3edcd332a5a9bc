"""What the pixels of label files mean: a class, or void.

A label file holds gray values, palette indices or colors. Each stands for a
label value: the number of a line of classes.txt, counted from 0, or the ignore
label. Label values that are not void stand for the classes, 0..C-1 without a
gap, which are stored and trained on.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np

from deeplab_jax.data.label_files import LabelFile
from deeplab_jax.runtime.errors import UserError

_COLOR = re.compile(r'(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)')
_VOID = 'void'
_LABEL_MAP = 'config.data.label_map'


def parse_classes(
  lines: Sequence[str],
) -> tuple[tuple[str, ...], np.ndarray | None]:
  """Splits lines of 'name', or all of 'name R G B', into names and colors.

  Colors are uint8 [N, 3], or None. Raises `ValueError` if only some lines have
  a color, or a color is wrong.
  """
  found = [_COLOR.fullmatch(line) for line in lines]
  if not any(found):
    return tuple(lines), None
  names: dict[tuple[int, ...], str] = {}
  for line, match in zip(lines, found, strict=True):
    if not match:
      raise ValueError(
        f'{line!r} has no color, and others have one; end every line or none '
        'with R G B'
      )
    name, color = match[1], tuple(map(int, match.groups()[1:]))
    if max(color) > 255:
      raise ValueError(f'the color of {name!r}, {color}, is not in 0..255')
    if color in names:
      raise ValueError(f'{names[color]!r} and {name!r} have one color, {color}')
    names[color] = name
  return tuple(names.values()), np.array(list(names), np.uint8)


def parse_label_map(text: str, ignore_label: int) -> dict[int, int]:
  """Reads `config.data.label_map`, as '255:1' or '0:void,1:0,2:0'.

  Each pair is a value in the files and the label value it stands for. Raises
  `UserError` naming the pair that is wrong.
  """
  result: dict[int, int] = {}
  for pair in filter(None, map(str.strip, text.split(','))):
    match = re.fullmatch(r'(\d{1,9})\s*:\s*(\d{1,9}|void)', pair)
    if not match or int(match[1]) > 255:
      raise UserError(
        f'{_LABEL_MAP}: {pair!r} is no pair of a value 0..255 in the files and '
        "a class index or void, as in '255:1' or '0:void,1:0'"
      )
    value = int(match[1])
    if value in result:
      raise UserError(f'{_LABEL_MAP}: the value {value} stands twice')
    result[value] = ignore_label if match[2] == _VOID else int(match[2])
  return result


class Meaning:
  """Turns what label files hold into classes.

  Attributes:
    lines: the names in classes.txt, by label value.
    line_colors: uint8 [len(lines), 3], or None where the lines have none.
    classes: the names without those of void; `values` are their label values,
      and `colors`, uint8 [C, 3] or None, their colors.
    void_values: the label values of void; `void_value` is one of them.
    stored_ignore_label: what is stored for them, never one of 0..C-1.
    label_map: the label values of those file values that mean another one.
  """

  def __init__(
    self, lines: Sequence[str], ignore_label: int = 255, label_map: str = ''
  ) -> None:
    """Takes the lines of classes.txt; raises `UserError` if parts disagree."""
    self.lines, self.line_colors = parse_classes(lines)
    count = len(self.lines)
    self.void_value = ignore_label
    self.void_values = {ignore_label}
    if self.line_colors is not None:  # one line may give void its color
      named = (v for v in range(count) if self.lines[v].casefold() == _VOID)
      self.void_values.update(named)
    self.values = tuple(v for v in range(count) if v not in self.void_values)
    self.classes = tuple(self.lines[value] for value in self.values)
    colors = self.line_colors
    self.colors = None if colors is None else colors[list(self.values)]
    listed = [] if colors is None else map(tuple, colors.tolist())
    self._value_of = {color: value for value, color in enumerate(listed)}
    self.stored_ignore_label = 255 if ignore_label < count else ignore_label
    self.label_map = parse_label_map(label_map, ignore_label)
    for value, target in self.label_map.items():
      if self.lines and target >= count and target != ignore_label:
        raise UserError(
          f'{_LABEL_MAP}: {value}:{target} names class {target}, and '
          f'classes.txt has {count} lines, 0 to {count - 1}'
        )
    if self.lines and not self.values:
      raise UserError(
        'classes.txt names no class besides void, '
        f'config.data.ignore_label={ignore_label}; add a line for each class'
      )
    self._table = np.arange(256, dtype=np.uint8)
    self._table[list(self.label_map)] = list(self.label_map.values())
    self._stored = np.full(256, self.stored_ignore_label, np.uint8)
    self._stored[list(self.values)] = np.arange(len(self.values))

  def file_values(self) -> tuple[int, ...]:
    """Returns a value that stands for each class in the files, all different.

    Of several values of one class it is the first that the label map names.
    """
    own = {v: v for v in self.values if v not in self.label_map}
    own |= {t: v for v, t in reversed(self.label_map.items())}
    taken = {*own.values(), *self.label_map, self.void_value}
    free = (v for v in range(256) if v not in taken)
    return tuple(own[v] if v in own else next(free) for v in self.values)

  def label_values(self, file: LabelFile) -> np.ndarray:
    """Returns label values uint8 [H, W]; refuses the color of no class."""
    pixels, palette = file.pixels, file.palette
    if self.line_colors is None or (palette is None and pixels.ndim == 2):
      indices = file.indices()
      return self._table[indices] if self.label_map else indices
    if self.label_map:
      raise UserError(
        f'{file.path}: {_LABEL_MAP} maps values, but this label is read by the '
        'colors in classes.txt; leave one of the two out'
      )
    if palette is not None:
      return self._of_palette(file, palette)
    codes, places, counts = np.unique(
      pixels @ np.array([1 << 16, 1 << 8, 1]),
      return_inverse=True,
      return_counts=True,
    )
    colors = codes[:, None] >> (16, 8, 0) & 255
    values = self._of_colors(colors, counts, file.path)
    return values[places].reshape(pixels.shape[:2])

  def to_classes(self, values: np.ndarray) -> np.ndarray:
    """Returns classes and the stored ignore label for label values uint8."""
    return self._stored[values]

  def used_colors(self, file: LabelFile) -> list[list[Any]]:
    """Returns what `Palettes.add` takes, for the indices that mean a class.

    Empty where the class does not come from the index. Void may have any color.
    """
    if file.palette is None or self.line_colors is not None:
      return []
    padded = np.vstack([file.palette, np.zeros((256, 3), np.uint8)])
    return [
      [index, *padded[index].tolist(), str(file.path)]
      for index in np.flatnonzero(_counts(file.pixels)).tolist()
      if self._table[index] != self.void_value
    ]

  def _of_palette(self, file: LabelFile, palette: np.ndarray) -> np.ndarray:
    """By color; the ignore label may have any, unless its line has one."""
    counts, void = _counts(file.pixels), self.void_value
    if void >= len(self.lines):
      color = tuple(palette[void : void + 1].ravel().tolist())
      value = self._value_of.get(color)
      if counts[void] and value in self.values:
        raise UserError(
          f'{file.path}: index {void} is void, config.data.ignore_label, but '
          f'has the color of class {self.lines[value]!r}, {_words(color)}; give'
          ' it another one, or remove the colors in classes.txt to read indices'
        )
      counts[void] = 0
    used = np.flatnonzero(counts)
    if used.max(initial=0) >= len(palette):
      raise UserError(
        f'{file.path}: index {used[-1]} has no color, as the palette has only '
        f'{len(palette)}; correct the file'
      )
    table = np.full(256, void, np.uint8)
    table[used] = self._of_colors(palette[used], counts[used], file.path)
    return table[file.pixels]

  def _of_colors(
    self, colors: np.ndarray, counts: np.ndarray, path: Any
  ) -> np.ndarray:
    """Returns the label values uint8 [N] of colors [N, 3] of so many pixels."""
    values = [self._value_of.get(tuple(c), -1) for c in colors.tolist()]
    if -1 in values:
      index = np.argmax(np.where(np.less(values, 0), counts, 0))
      raise UserError(
        f'{path}: the color {_words(colors[index])} ({counts[index]:.0f} '
        'pixels) is none of those in classes.txt; correct the file, or give '
        f"the color to a class or to '{_VOID}' there"
      )
    return np.array(values, np.uint8)


class Palettes(dict[int, list[Any]]):
  """The rows [index, red, green, blue, path] that showed each index first."""

  def add(self, rows: Iterable[list[Any]]) -> None:
    """Adds indices in use; raises `UserError` if one has several colors."""
    for row in rows:
      index, *color, path = row
      _, *other, first = self.setdefault(index, row)
      if color != other:
        raise UserError(
          f'{path}: index {index} has the color {_words(color)}, but in {first}'
          f' {_words(other)}, so indices of one class differ; store gray PNGs, '
          'or give each class its color in classes.txt, as in "name 255 0 0"'
        )


def _counts(pixels: np.ndarray) -> np.ndarray:
  """Pixels of each value, float32 [256], in a tenth of np.bincount's time."""
  return cv2.calcHist([pixels], [0], None, [256], [0, 256]).ravel()


def _words(color: Iterable[int]) -> str:
  return ' '.join(map(str, color))
