"""What the pixels of label files mean: a class, or void.

A pixel goes three steps. The file holds a gray value, a palette index or a
color. That stands for a label value: the number of a line of classes.txt,
counted from 0, or the ignore label. A label value that is not void stands for a
class: lines that name no class are left out, so classes are 0..C-1 without a
gap, and that is what is stored and trained on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np

from deeplab_jax.runtime import errors

_COLOR = re.compile(r'(.*\S)\s+(\d+)\s+(\d+)\s+(\d+)')
_VOID = 'void'
_LABEL_MAP = 'config.data.label_map'


@dataclasses.dataclass(frozen=True, eq=False)
class ClassList:
  """What classes.txt says.

  Attributes:
    lines: the names, by label value.
    colors: uint8 [len(lines), 3], or None where the lines have none.
  """

  lines: tuple[str, ...]
  colors: np.ndarray | None = None

  @property
  def void_line(self) -> int | None:
    """The label value of the line that gives void its color, or None."""
    names = [name.casefold() for name in self.lines]
    if self.colors is not None and _VOID in names:
      return names.index(_VOID)
    return None


def parse_classes(lines: Sequence[str]) -> ClassList:
  """Reads lines of 'name', or all of 'name R G B'.

  Raises:
    ValueError: if some lines alone have a color, or a color is wrong.
  """
  found = [_COLOR.fullmatch(line) for line in lines]
  if not any(found):
    return ClassList(tuple(lines))
  for line, match in zip(lines, found, strict=True):
    if match is None:
      raise ValueError(
        f'{line!r} has no color, and others have one; end every line or none '
        'with R G B'
      )
  names = tuple(match[1] for match in found)
  colors = [tuple(map(int, match.groups()[1:])) for match in found]
  for name, color in zip(names, colors, strict=True):
    if max(color) > 255:
      raise ValueError(f'the color of {name!r}, {color}, is not in 0..255')
    other = names[colors.index(color)]
    if other != name:
      raise ValueError(f'{other!r} and {name!r} have one color, {color}')
  return ClassList(names, np.array(colors, np.uint8))


def parse_label_map(text: str, ignore_label: int) -> dict[int, int]:
  """Reads `config.data.label_map`: '255:1' or '0:void,1:0,2:0'.

  Args:
    text: pairs of a value in the files and a label value or 'void', by commas.
    ignore_label: what void stands for.

  Raises:
    UserError: naming the pair that is wrong.
  """
  result: dict[int, int] = {}
  for pair in filter(None, (part.strip() for part in text.split(','))):
    match = re.fullmatch(r'(\d+)\s*:\s*(\d+|void)', pair)
    if not match or int(match[1]) > 255:
      raise errors.UserError(
        f'{_LABEL_MAP}: {pair!r} is no pair of a value 0..255 in the files and '
        "a class index or void, as in '255:1' or '0:void,1:0'"
      )
    value = int(match[1])
    if value in result:
      raise errors.UserError(f'{_LABEL_MAP}: the value {value} stands twice')
    result[value] = ignore_label if match[2] == _VOID else int(match[2])
  return result


class Meaning:
  """Turns what label files hold into classes.

  Attributes:
    lines: the names in classes.txt, by label value; none where it is not known.
    classes: the names without those of void.
    values: the label value of each class.
    void_values: the label values of void.
    ignore_label: that of them that is set.
    stored_ignore_label: what is stored for them, never one of 0..C-1.
    label_map: the label value of a value in the files, where it is another.
  """

  def __init__(
    self,
    class_list: ClassList | None,
    ignore_label: int = 255,
    label_map: str = '',
  ) -> None:
    """Raises `UserError` if the parts contradict each other."""
    class_list = class_list or ClassList(())
    self.lines, self._colors = class_list.lines, class_list.colors
    self.ignore_label = ignore_label
    self.void_values = {ignore_label, class_list.void_line} - {None}
    self.values = tuple(
      v for v in range(len(self.lines)) if v not in self.void_values
    )
    self.classes = tuple(self.lines[value] for value in self.values)
    in_range = ignore_label < len(self.lines)
    self.stored_ignore_label = 255 if in_range else ignore_label
    self.label_map = parse_label_map(label_map, ignore_label)
    for value, target in self.label_map.items():
      if self.lines and target >= len(self.lines) and target != ignore_label:
        raise errors.UserError(
          f'{_LABEL_MAP}: {value}:{target} names class {target}, and '
          f'classes.txt has {len(self.lines)} lines, 0 to {len(self.lines) - 1}'
        )
    if self.lines and not self.values:
      raise errors.UserError(
        'classes.txt names no class beside void, '
        f'config.data.ignore_label={ignore_label}; add a line for each class'
      )
    self._table = np.arange(256, dtype=np.uint8)
    self._table[list(self.label_map)] = list(self.label_map.values())
    self._stored = np.full(256, self.stored_ignore_label, np.uint8)
    self._stored[list(self.values)] = np.arange(len(self.values))

  @property
  def colors(self) -> np.ndarray | None:
    """The color of each class in classes.txt, uint8 [C, 3], or None."""
    return None if self._colors is None else self._colors[list(self.values)]

  def file_values(self) -> tuple[int, ...]:
    """A value that stands for each class in the files, all different.

    Of several values of one class it is the first that the label map names.
    """
    chosen: list[int | None] = []
    for value in self.values:
      named = [v for v, target in self.label_map.items() if target == value]
      if not named and self._table[value] == value:
        named = [value]
      chosen.append(named[0] if named else None)
    taken = {*chosen, *self.label_map, self.ignore_label}
    free = (v for v in range(256) if v not in taken)
    return tuple(next(free) if v is None else v for v in chosen)

  def label_values(self, file: Any) -> np.ndarray:
    """Returns the label values uint8 [H, W] that an `images.LabelFile` holds.

    Raises:
      UserError: if it holds colors that are no class's.
    """
    if self._colors is None or (file.palette is None and file.pixels.ndim == 2):
      indices = file.indices()
      return self._table[indices] if self.label_map else indices
    if self.label_map:
      raise errors.UserError(
        f'{file.path}: {_LABEL_MAP} maps values, but this label is read by the '
        'colors in classes.txt; leave one of the two out'
      )
    if file.pixels.ndim == 3:
      return self._of_colors(file.pixels, file.path)
    return self._of_palette(file)

  def to_classes(self, values: np.ndarray) -> np.ndarray:
    """Returns classes and the stored ignore label for label values uint8."""
    return self._stored[values]

  def used_colors(self, file: Any) -> dict[int, tuple[int, ...]]:
    """Colors of the palette indices in use whose order is what gives a class.

    Empty where the class does not come from the index. Void may have any color.
    """
    if file.palette is None or self._colors is not None:
      return {}
    # A tenth of the time of np.bincount.
    used = cv2.calcHist([file.pixels], [0], None, [256], [0, 256]).ravel()
    return {
      int(index): _color_at(file.palette, index)
      for index in np.flatnonzero(used)
      if self._table[index] != self.ignore_label
    }

  def _of_palette(self, file: Any) -> np.ndarray:
    """By color; the ignore label may have any, unless its line has one."""
    values = np.full(file.pixels.shape, self.ignore_label, np.uint8)
    by_color = file.pixels != self.ignore_label
    by_color |= self.ignore_label < len(self.lines)
    self._refuse_colored_void(file, by_color)
    indices = file.pixels[by_color]
    last = int(indices.max(initial=0))
    if last >= len(file.palette):
      raise errors.UserError(
        f'{file.path}: index {last} has no color, as the palette has '
        f'{len(file.palette)} alone; correct the file'
      )
    values[by_color] = self._of_colors(file.palette[indices], file.path)
    return values

  def _refuse_colored_void(self, file: Any, by_color: np.ndarray) -> None:
    """Refuses void by its index that has the color of a class."""
    if by_color.all() or self.ignore_label >= len(file.palette):
      return
    color = _color_at(file.palette, self.ignore_label)
    colors = list(map(tuple, self.colors.tolist()))
    if color in colors:
      raise errors.UserError(
        f'{file.path}: index {self.ignore_label} is void, '
        'config.data.ignore_label, but has the color of the class '
        f'{self.classes[colors.index(color)]!r}, {_words(color)}; give that '
        'index another color, or leave the colors out of classes.txt to read '
        'indices'
      )

  def _of_colors(self, pixels: np.ndarray, path: Any) -> np.ndarray:
    """The label values [...] of colors uint8 [..., 3]."""
    codes = _codes(self._colors)
    order = np.argsort(codes)
    found = _codes(pixels)
    places = np.searchsorted(codes[order], found).clip(max=len(codes) - 1)
    values = order[places].astype(np.uint8)
    strange = found != codes[values]
    if strange.any():
      kinds, counts = np.unique(found[strange], return_counts=True)
      code = int(kinds[counts.argmax()])
      color = ' '.join(str(code >> shift & 255) for shift in (16, 8, 0))
      raise errors.UserError(
        f'{path}: the color {color} ({counts.max()} pixels) is none of those '
        'in classes.txt; correct the file, or give the color to a class or to '
        f"'{_VOID}' there"
      )
    return values


class Palettes:
  """Looks that palette labels agree on the color of every index."""

  def __init__(self) -> None:
    self._first: dict[int, tuple[tuple[int, ...], str]] = {}

  def add(self, path: Any, colors: dict[int, tuple[int, ...]]) -> None:
    """Compares the used colors of a file, by index, with those of others.

    Raises:
      UserError: naming two files and the index that they color differently.
    """
    for index, color in colors.items():
      other, first = self._first.setdefault(index, (tuple(color), str(path)))
      if other != tuple(color):
        raise errors.UserError(
          f'{path}: index {index} has the color {_words(color)}, but in '
          f'{first} {_words(other)}, so indices of one class differ; store '
          'gray PNGs of class indices, or give each class its color in '
          'classes.txt, as in "name 255 0 0"'
        )

  def color(self, index: int) -> tuple[int, ...] | None:
    """The color of an index, or None where none has used it."""
    return self._first[index][0] if index in self._first else None

  def to_json(self) -> list[list[Any]]:
    """Returns rows that `merge` reads."""
    return [
      [index, *color, path] for index, (color, path) in self._first.items()
    ]

  def merge(self, rows: Iterable[Sequence[Any]]) -> None:
    """Adds what `to_json` gave; raises as `add`."""
    for index, *color, path in rows:
      self.add(path, {index: tuple(color)})


def _color_at(palette: np.ndarray, index: int) -> tuple[int, ...]:
  return tuple(palette[index].tolist()) if index < len(palette) else (0, 0, 0)


def _words(color: Sequence[int]) -> str:
  return ' '.join(map(str, color))


def _codes(colors: np.ndarray) -> np.ndarray:
  """One number for each color, uint8 [..., 3]."""
  red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue
