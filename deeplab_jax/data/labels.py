"""What the pixels of label files mean: a class, or void.

A label file holds gray values, palette indices or colors. Each stands for a
label value: the number of a line of classes.txt, counted from 0, or the ignore
label. Label values that are not void stand for the classes, 0..C-1 without a
gap, which are stored and trained on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np

from deeplab_jax.data.label_files import LabelFile
from deeplab_jax.runtime.errors import LabelError, UserError

# What a label map maps: a value, a color, or `OTHER` for all it does not name.
Key: TypeAlias = int | tuple[int, ...] | str
OTHER = 'other'

_COLOR = re.compile(r'(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)')
_VOID = 'void'
_LABEL_MAP = 'config.data.label_map'
_PAIR = re.compile(
  r'(?:(\d{1,5})(?:-(\d{1,5}))?|#([0-9a-f]{6})|other)\s*'
  r':\s*(?:(\d{1,3})(?:-(\d{1,3}))?|void)',
  re.IGNORECASE,
)


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


def parse_label_map(text: str, ignore_label: int) -> dict[Key, int]:
  """Reads `config.data.label_map`: pairs of what files hold and what it means.

  On the left is a value '255', a range '1-9', a color '#ff0000', or 'other' for
  all that is not named; on the right a label value, 'void', or a range as long
  as that on the left. Raises `UserError` naming the pair that is wrong.

  >>> parse_label_map('0:void,1-3:0-2,7-8:2,#0000ff:1', 255)
  {0: 255, 1: 0, 2: 1, 3: 2, 7: 2, 8: 2, (0, 0, 255): 1}
  """
  result: dict[Key, int] = {}
  for pair in filter(None, map(str.strip, text.split(','))):
    found = _PAIR.fullmatch(pair)
    low, high, color, first, last = found.groups() if found else [None] * 5
    keys: list[Key] = [*range(int(low or 0), int(high or low or -1) + 1)]
    if found and not low:
      keys = [tuple(bytes.fromhex(color)) if color else OTHER]
    targets = [int(first) if first else ignore_label] * len(keys)
    if first and last:
      targets = [*range(int(first), int(last) + 1)]
    most = max((key for key in keys if isinstance(key, int)), default=0)
    if not keys or len(keys) != len(targets) or max(most >> 8, *targets) > 255:
      raise UserError(
        f"{_LABEL_MAP}: {pair!r} is no pair of a value 0..65535, a range '1-9',"
        " a color '#ff0000' or 'other', and a class index, a range as long, or "
        "void, as in '255:1', '0:void,1-9:0-8' or '#ff0000:1'"
      )
    for key, target in zip(keys, targets, strict=True):
      if key in result:
        raise UserError(f'{_LABEL_MAP}: the value {word(key)} stands twice')
      result[key] = target
  return result


def word(key: Key) -> str:
  """Writes a value or color as a label map does."""
  return f'#{bytes(key).hex()}' if isinstance(key, tuple) else str(key)


def write_label_map(table: Mapping[Any, int], void: int) -> str:
  """Writes a label map briefly: values in ranges, and only what changes."""
  # With `other`, all classes are named and void is not.
  kept = {
    key: target
    for key, target in table.items()
    if target != (void if OTHER in table and key != OTHER else key)
  }
  runs: list[list[int]] = []
  for key in sorted(key for key in kept if isinstance(key, int)):
    low, high, first, last = runs[-1] if runs else (-9, -9, 0, 0)
    step = kept[key] - last
    alike = step in (0, 1) and step * (high - low) == last - first
    if key == high + 1 and alike:
      runs[-1][1::2] = key, kept[key]
    else:
      runs.append([key, key, kept[key], kept[key]])
  pairs = [(_range(*run[:2]), _range(*run[2:])) for run in runs]
  others = [key for key in kept if not isinstance(key, int)]
  others.sort(key=lambda key: (key == OTHER, kept[key]))
  pairs += [(word(key), str(kept[key])) for key in others]
  void_too = {str(void): 'void'}
  return ','.join(f'{key}:{void_too.get(to, to)}' for key, to in pairs)


def _range(first: int, last: int) -> str:
  return str(first) if first == last else f'{first}-{last}'


class Meaning:
  """Turns what label files hold into classes.

  Attributes:
    lines: the names in classes.txt, by label value.
    line_colors: uint8 [len(lines), 3], or None where the lines have none.
    classes: the names without those of void; `values` are their label values,
      and `colors`, uint8 [C, 3] or None, their colors.
    void_values: the label values of void; `void_value` is one of them.
    stored_ignore_label: what is stored for them, never one of 0..C-1.
    label_map: the label values of those file values and colors that it names.
    color_values: the label value of each color (r, g, b); empty without colors.
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
    self.stored_ignore_label = 255 if ignore_label < count else ignore_label
    self.label_map = parse_label_map(label_map, ignore_label)
    for key, target in self.label_map.items():
      if self.lines and target >= count and target != ignore_label:
        raise UserError(
          f'{_LABEL_MAP}: {word(key)}:{target} names class {target}, and '
          f'classes.txt has {count} lines, 0 to {count - 1}'
        )
    if self.lines and not self.values:
      raise UserError(
        'classes.txt names no class besides void, '
        f'config.data.ignore_label={ignore_label}; add a line for each class'
      )
    colors = () if self.line_colors is None else self.line_colors.tolist()
    self.color_values = {tuple(c): v for v, c in enumerate(colors)}
    self._table = np.arange(2**16).astype(np.uint8)
    if (other := self.label_map.get(OTHER)) is not None:
      self._table[:] = other
    for key, target in self.label_map.items():
      if isinstance(key, int):
        self._table[key] = target
      elif isinstance(key, tuple):
        self.color_values[key] = target
    first = {v: color for color, v in reversed(self.color_values.items())}
    found = [first[value] for value in self.values if value in first]
    complete = found and len(found) == len(self.values)
    self.colors = np.array(found, np.uint8) if complete else None
    self._stored = np.full(256, self.stored_ignore_label, np.uint8)
    self._stored[list(self.values)] = np.arange(len(self.values))

  def file_values(self) -> tuple[int, ...]:
    """Returns a value that stands for each class in the files, all different.

    Of several values of one class it is the first that the label map names.
    Raises `UserError` if a class has none, and none is left.
    """
    own = {v: v for v in self.values if v not in self.label_map}
    own |= {
      target: key
      for key, target in reversed(self.label_map.items())
      if isinstance(key, int) and key < 256
    }
    taken = {*own.values(), *self.label_map, self.void_value}
    free = (v for v in range(256) if v not in taken)
    values = tuple(own[v] if v in own else next(free, -1) for v in self.values)
    if -1 in values:
      raise UserError(
        f'{_LABEL_MAP} leaves no value for the class '
        f'{self.classes[values.index(-1)]!r}; give it one, or remove its line'
      )
    return values

  def label_values(self, file: LabelFile) -> np.ndarray:
    """Returns label values uint8 [H, W]; refuses the color of no class."""
    pixels, palette = file.pixels, file.palette
    kinds = {type(key) for key in self.label_map}
    if not self.color_values or (palette is None and pixels.ndim == 2):
      known = range(2**16) if str in kinds else self.label_map
      indices = file.indices(known)
      if self.label_map and indices.dtype == np.uint8:
        return cv2.LUT(indices, self._table[:256])  # takes little memory
      return self._table[indices] if self.label_map else indices
    if int in kinds and tuple not in kinds:
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
    if file.palette is None or self.color_values:
      return []
    padded = np.vstack([file.palette, np.zeros((256, 3), np.uint8)])
    return [
      [index, *padded[index].tolist(), str(file.path)]
      for index in np.flatnonzero(count_values(file.pixels)).tolist()
      if self._table[index] != self.void_value
    ]

  def _of_palette(self, file: LabelFile, palette: np.ndarray) -> np.ndarray:
    """By color; the ignore label may have any, unless its line has one."""
    counts, void = count_values(file.pixels), self.void_value
    if void >= len(self.lines):
      color = tuple(palette[void : void + 1].ravel().tolist())
      value = self.color_values.get(color)
      if counts[void] and value in self.values:
        raise LabelError(
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
    return cv2.LUT(file.pixels, table)

  def _of_colors(
    self, colors: np.ndarray, counts: np.ndarray, path: Any
  ) -> np.ndarray:
    """Returns the label values uint8 [N] of colors [N, 3] of so many pixels."""
    other = self.label_map.get(OTHER, -1)
    values = [self.color_values.get(tuple(c), other) for c in colors.tolist()]
    if -1 in values:
      index = np.argmax(np.where(np.less(values, 0), counts, 0))
      where = _LABEL_MAP if self.line_colors is None else 'classes.txt'
      raise LabelError(
        f'{path}: the color {_words(colors[index])} ({counts[index]} '
        f'pixels) is none of those in {where}; correct the file, or give '
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
        raise LabelError(
          f'{path}: index {index} has the color {_words(color)}, but in {first}'
          f' {_words(other)}, so indices of one class differ; store gray PNGs, '
          'or give each class its color in classes.txt, as in "name 255 0 0"'
        )


def count_values(pixels: np.ndarray) -> np.ndarray:
  """Returns the pixels uint8 [H, W] of each value, int64 [256].

  Takes a tenth of the time of np.bincount and no memory. Above 2^24 pixels of a
  value, the number is rounded.
  """
  counts = cv2.calcHist([pixels], [0], None, [256], [0, 256])
  return counts.ravel().astype(np.int64)


def _words(color: Iterable[int]) -> str:
  return ' '.join(map(str, color))
