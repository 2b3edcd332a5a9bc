"""A confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.visualize.lettering import draw_text, text_length

_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_EMPTY = (232, 232, 232)
_FULL = np.array([8, 64, 129])
_SIDE = 1600  # wanted, of all cells together
_CELLS = (12, 44)
_CELL_WITH_NUMBER = 26
_SHOWN = 0.005  # smaller shares would read 0


def confusion_picture(
  confusion: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
  """Draws which class was taken for which.

  Rows are the true classes, columns the predicted ones. Each row is in per cent
  of its class's pixels, the darker the more; that of a class without any is
  gray.

  Args:
    confusion: int [C, C], rows truth, columns prediction.
    classes: the C class names, in any script.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the sizes do not agree.
  """
  confusion, count = np.asarray(confusion), len(classes)
  if confusion.shape != (count, count):
    raise ValueError(
      f'confusion must be [{count}, {count}], got {list(confusion.shape)}'
    )
  cell = min(max(_SIDE // count, _CELLS[0]), _CELLS[1])
  size = min(cell - 2, 16)
  corner = int(max(text_length(name, size) for name in classes)) + 2 * cell
  picture = Image.new('RGB', (corner + count * cell + cell // 2,) * 2, _PAPER)
  _write_names(picture, classes, size, cell, corner)
  _paint_cells(picture, confusion, cell, corner)
  return np.asarray(picture)


def _write_names(
  picture: Image.Image,
  classes: Sequence[str],
  size: int,
  cell: int,
  corner: int,
) -> None:
  """Writes the names before the rows, and upwards above the columns."""
  side = picture.width - corner
  rows, columns = (Image.new('RGB', (corner, side), _PAPER) for _ in range(2))
  gap = cell // 3
  for index, name in enumerate(classes):
    middle = index * cell + cell // 2
    for strip, place, align in (
      (rows, (corner - gap, middle), 'right'),
      (columns, (gap, middle), 'left'),
    ):
      draw_text(ImageDraw.Draw(strip), place, name, _INK, size, align)
  picture.paste(rows, (0, corner))
  picture.paste(columns.transpose(Image.Transpose.ROTATE_90), (corner, 0))
  middle = corner + side // 2
  draw = ImageDraw.Draw(picture)
  draw_text(draw, (middle, cell // 2), 'predicted', _INK, size, 'center')
  title = Image.new('RGB', (side, cell), _PAPER)
  draw = ImageDraw.Draw(title)
  draw_text(draw, (side // 2, cell // 2), 'true', _INK, size, 'center')
  picture.paste(title.transpose(Image.Transpose.ROTATE_90), (0, corner))


def _paint_cells(
  picture: Image.Image, confusion: np.ndarray, cell: int, corner: int
) -> None:
  draw = ImageDraw.Draw(picture)
  for row, counts in enumerate(confusion):
    total = counts.sum()
    for column, pixels in enumerate(counts):
      share = pixels / total if total else 0.0
      left, top = corner + column * cell, corner + row * cell
      color = np.rint(255 + share * (_FULL - 255)).astype(int)
      fill = tuple(color.tolist()) if total else _EMPTY
      draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill)
      if share >= _SHOWN and cell >= _CELL_WITH_NUMBER:
        middle = (left + cell // 2 - 1, top + cell // 2 - 1)
        ink = _PAPER if share > 0.5 else _INK
        number = f'{100 * share:.0f}'
        draw_text(draw, middle, number, ink, cell // 3 + 1, 'center')
