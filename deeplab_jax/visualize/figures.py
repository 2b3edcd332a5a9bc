"""Figures of a whole split, uint8 [H, W, 3]: confusion matrix, sample page."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.data import images
from deeplab_jax.data.datasets import DatasetInfo, Tally
from deeplab_jax.data.pipeline import in_background
from deeplab_jax.runtime.errors import require
from deeplab_jax.visualize import labels
from deeplab_jax.visualize.lettering import INK, WHITE, draw_text, text_length

# The confusion matrix, in pixels.
_SIDE = 1600  # wanted for all cells together
_CELLS = (12, 44)  # smallest and largest cell
_CELL_WITH_NUMBER = 26
_SHOWN = 0.005  # smaller shares would read 0
_EMPTY = (232, 232, 232)
_FULL = np.array([8, 64, 129])

# The page of samples, in pixels.
_PAGE = (3800, 1860)  # largest height and width, without the margin
_PICTURE = 300  # largest width of an image
_CAPTION = 42  # height of the line above a sample
_GAP = 4  # between pictures

_CANDIDATES = 24  # images of a class from which its samples are chosen


def confusion_picture(
  confusion: np.ndarray, classes: Sequence[str]
) -> np.ndarray:
  """Draws which class was taken for which.

  The rows of the matrix, int [C, C], are the true classes and its columns the
  predicted ones. Each row is shown in percent of its class's pixels: the more,
  the darker. The row of a class without pixels is gray.
  """
  confusion, count = np.asarray(confusion), len(classes)
  rule, found = f'confusion must be [{count}, {count}]', list(confusion.shape)
  require(found == [count, count], rule, found)
  cell = min(max(_SIDE // count, _CELLS[0]), _CELLS[1])
  size = min(cell - 2, 16)
  corner = int(max(text_length(name, size) for name in classes)) + 2 * cell
  side = count * cell + cell // 2
  picture = Image.new('RGB', (corner + side,) * 2, WHITE)

  def write(title: str, middle: int, names_at: int, align: str) -> None:
    draw = ImageDraw.Draw(picture)
    draw_text(draw, (middle, cell // 2), title, size, 'center')
    for index, name in enumerate(classes):
      y = corner + index * cell + cell // 2
      draw_text(draw, (names_at, y), name, size, align)

  write('predicted', corner + side // 2, corner - cell // 3, 'right')
  # Upward text is written on the picture turned to the right.
  picture = picture.transpose(Image.Transpose.ROTATE_270)
  write('true', side // 2, side + cell // 3, 'left')
  picture = picture.transpose(Image.Transpose.ROTATE_90)
  _paint_cells(picture, confusion, cell, corner)
  return np.asarray(picture)


def _paint_cells(
  picture: Image.Image, confusion: np.ndarray, cell: int, corner: int
) -> None:
  totals = confusion.sum(1, keepdims=True)
  shares = confusion / np.maximum(totals, 1)
  colors = np.rint(255 + shares[..., None] * (_FULL - 255))
  colors = np.where(totals[..., None] > 0, colors, _EMPTY).astype(np.uint8)
  cells = colors.repeat(cell, 0).repeat(cell, 1)
  cells[cell - 1 :: cell] = cells[:, cell - 1 :: cell] = WHITE
  picture.paste(Image.fromarray(cells), (corner, corner))
  if cell < _CELL_WITH_NUMBER:
    return
  draw = ImageDraw.Draw(picture)
  for row, column in np.argwhere(shares >= _SHOWN).tolist():
    share, middle = shares[row, column], corner + cell // 2 - 1
    place = middle + column * cell, middle + row * cell
    color = WHITE if share > 0.5 else INK
    number = f'{100 * share:.0f}'
    draw_text(draw, place, number, cell // 3 + 1, 'center', color)


def sample_page(
  source: Sequence[dict[str, bytes]],
  info: DatasetInfo,
  tally: Tally,
  title: str,
) -> np.ndarray:
  """Draws samples of every class, image beside label, below a legend.

  It lets a person check that the data are right. `source` holds the records of
  a split and `tally` its counts; the same records give the same page, at most
  about 2000 pixels wide and 4000 high.
  """
  present = np.flatnonzero(tally.class_pixels).tolist()
  per_class = 3 if len(present) <= 12 else 2 if len(present) <= 30 else 1
  heading = labels.legend([(title, None)], _PAGE[1], 32)
  parts = [[heading], [_page_legend(info, tally)]]
  if present:
    height = _PAGE[0] - sum(part.shape[0] for (part,) in parts)
    columns, box = _layout(len(present), per_class, tally, height)
    chosen = _choose(source, tally, per_class)
    tiles = []
    for index in present:
      row = [_tile(source[r], index, info, box) for r in chosen[index]]
      # Blank tiles keep the samples of each class in the same columns.
      tiles += row + [np.full_like(row[0], 255)] * (per_class - len(row))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    parts.append([labels.grid(rows, 3 * _GAP)])
  page = labels.grid(parts, 2 * _GAP)
  return np.pad(page, [[4 * _GAP], [4 * _GAP], [0]], constant_values=255)


def _page_legend(info: DatasetInfo, tally: Tally) -> np.ndarray:
  """Names all classes with their share of pixels and number of images."""
  shares = tally.class_pixels / max(tally.class_pixels.sum(), 1)
  counted = zip(info.classes, shares, tally.class_images, strict=True)
  texts = [f'{name}  {share:.2%} in {n:,} images' for name, share, n in counted]
  void = tally.void_pixels / sum(h * w * n for (h, w), n in tally.sizes.items())
  texts.append(f'void  {void:.2%} of all')
  colors = [*info.palette.tolist(), labels.VOID_COLOR]
  size = 13 if len(texts) > 40 else 24
  return labels.legend(list(zip(texts, colors, strict=True)), _PAGE[1], size)


def _layout(
  num_classes: int, per_class: int, tally: Tally, page_height: int
) -> tuple[int, tuple[int, int]]:
  """Returns samples per row, and the largest (height, width) of an image."""
  (height, width), _ = tally.sizes.most_common(1)[0]
  aspect = min(max(height / width, 0.5), 2.0)

  def width_of_images(columns: int) -> float:
    rows = -(-num_classes * per_class // columns)
    return min(
      _PICTURE,
      (_PAGE[1] / columns - 4 * _GAP) / 2,
      (page_height / rows - _CAPTION - 3 * _GAP) / aspect,
    )

  possible = range(per_class, num_classes * per_class + 1, per_class)
  columns = max(possible, key=width_of_images)
  largest = width_of_images(columns)
  return columns, (int(largest * aspect), int(largest))


def _choose(
  source: Sequence[dict[str, bytes]], tally: Tally, per_class: int
) -> dict[int, list[int]]:
  """Chooses record numbers for each class.

  They go from the image with the most of the class to the median one. The
  rarest class chooses first, and an image serves one class if it can.
  """
  counts = _count(source, tally)
  chosen: dict[int, list[int]] = {}
  taken: set[int] = set()
  for index in np.argsort(tally.class_images, kind='stable').tolist():
    having = sorted(
      (record for record, pixels in counts.items() if pixels[index]),
      key=lambda record: (-counts[record][index], record),
    )
    fresh = [record for record in having if record not in taken]
    if len(fresh) < per_class:
      fresh = having
    places = np.linspace(0, len(fresh) // 2, per_class).astype(int)
    chosen[index] = [fresh[p] for p in np.unique(places) if p < len(fresh)]
    taken.update(chosen[index])
  return chosen


def _count(
  source: Sequence[dict[str, bytes]], tally: Tally
) -> dict[int, np.ndarray]:
  """Counts the pixels of each class in some records, by record number.

  It reads a shuffled split until every class was seen often enough.
  """
  num_classes = len(tally.class_pixels)

  def pixels(record: int) -> np.ndarray:
    label = images.decode_label(source[record]['label'])
    return np.bincount(label.ravel(), minlength=256)[:num_classes]

  order = np.random.default_rng(0).permutation(len(source)).tolist()
  wanted = np.minimum(tally.class_images, _CANDIDATES)
  seen = np.zeros(num_classes, np.int64)
  counts: dict[int, np.ndarray] = {}
  counted = in_background(pixels, order)
  for record, counts[record] in zip(order, counted, strict=True):
    seen += counts[record] > 0
    if (seen >= wanted).all():
      break
  return counts


def _tile(
  record: dict[str, bytes], index: int, info: DatasetInfo, box: tuple[int, int]
) -> np.ndarray:
  """Draws a sample of class `index`: a caption above image and label."""
  image = images.decode_image(record['image'])
  label = images.decode_label(record['label'])
  share = labels.class_shares(label, info.num_classes, info.ignore_label)[index]
  name = record['name'].decode()
  caption = f'{info.classes[index]}  {share:.2%}  {name}'
  strip = labels.legend([(caption, info.palette[index])], 0, 20)
  tile = Image.new('RGB', (2 * box[1] + _GAP, _CAPTION + box[0]), WHITE)
  tile.paste(Image.fromarray(strip))
  colors = labels.colorize(label, info.palette, info.ignore_label)
  scale = min(box[0] / label.shape[0], box[1] / label.shape[1])
  size = [max(1, round(length * scale)) for length in reversed(label.shape)]
  for left, picture, how in (
    (0, image, Image.Resampling.LANCZOS),
    (size[0] + _GAP, colors, Image.Resampling.NEAREST),
  ):
    shown = Image.fromarray(labels.as_rgb(picture))
    tile.paste(shown.resize(size, how), (left, _CAPTION))
  return np.asarray(tile)
