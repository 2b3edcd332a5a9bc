"""Label maps as pictures and files: overlays with a legend, panels, PNG, JSON.

A label map is int [H, W] and holds the classes 0..C-1 and `ignore_label`, which
means void. A palette is uint8 [C, 3], the color of each class. All pictures are
uint8 [H, W, 3]. Other values, types and sizes are a `ValueError`.
"""

import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.runtime.errors import require
from deeplab_jax.runtime.files import replacing
from deeplab_jax.visualize.lettering import WHITE, draw_text, text_length

VOID_COLOR = (224, 224, 192)
MEDIA_TYPES = {
  'png': 'image/png',
  'json': 'application/json',
  'npz': 'application/x-npz',
}
_OUTLINE = (144, 144, 144)
_WIDEST = 640  # pixels of a picture below a title
_LINE = 4  # pixels between the pictures of a panel


def colorize(
  label: np.ndarray, palette: np.ndarray, ignore_label: int = 255
) -> np.ndarray:
  """Paints a label map: classes in their colors, void in `VOID_COLOR`."""
  palette = np.asarray(palette, np.uint8)
  label = _checked_label(label, len(palette), ignore_label)
  void = label == ignore_label
  colors = palette[np.where(void, 0, label)]
  colors[void] = VOID_COLOR
  return colors


def class_shares(
  label: np.ndarray, num_classes: int, ignore_label: int = 255
) -> np.ndarray:
  """Returns each class's share of the pixels that are not void, [C].

  The shares are 0 if all pixels are void.
  """
  label = _checked_label(label, num_classes, ignore_label)
  counts = np.bincount(label[label != ignore_label], minlength=num_classes)
  return counts / max(counts.sum(), 1)


def overlay(
  image: np.ndarray,
  label: np.ndarray,
  palette: np.ndarray,
  classes: Sequence[str],
  ignore_label: int = 255,
) -> np.ndarray:
  """Lays the class colors over an image, with a legend below it.

  Half is color and half is image; void shows the image. Thin light
  lines separate the classes, so that dark colors can be told apart. The legend
  names the classes that occur, the largest first, with their share of the
  pixels that are not void. Where it is wider, white is beside the image.
  """
  image, label = _checked_image(image, label), np.asarray(label)
  count = len(palette)
  require(len(classes) == count, f'classes must be {count} names', classes)
  colors = colorize(label, palette, ignore_label)
  weight = np.where(label == ignore_label, 0, np.float32(0.5))[..., None]
  painted = (1 - weight) * image + weight * colors
  border = _borders(label)
  painted[border] = 0.4 * painted[border] + 0.6 * np.asarray(WHITE)
  painted = np.rint(painted).astype(np.uint8)
  shares = class_shares(label, len(palette), ignore_label)
  entries = []
  for index in np.argsort(-shares, kind='stable')[: np.count_nonzero(shares)]:
    share = f'{shares[index]:.1%}' if shares[index] >= 0.0005 else '<0.1%'
    entries.append((f'{classes[index]} {share}', palette[index]))
  if not entries:
    return painted
  strip = legend(entries, image.shape[1], max(13, max(image.shape) // 64))
  return grid([[painted], [strip]], 0)


def _borders(label: np.ndarray) -> np.ndarray:
  """Returns where classes meet, bool [H, W]."""
  thickness = max(1, max(label.shape) // 800)
  border = np.zeros(label.shape, bool)
  border[:-thickness] |= label[thickness:] != label[:-thickness]
  border[:, :-thickness] |= label[:, thickness:] != label[:, :-thickness]
  return border


def panel(
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray] | None,
  predictions: Sequence[np.ndarray],
  palette: np.ndarray,
  ignore_label: int = 255,
  *,
  classes: Sequence[str] | None = None,
  names: Sequence[str] | None = None,
  mious: Sequence[float] | None = None,
) -> np.ndarray:
  """Puts image, label and prediction side by side, one row per image.

  Images may differ in size. Without `labels` a row is image and prediction.
  White lines separate the pictures. With `names` of
  the images, and perhaps their `mious` in 0..1, each picture has a title, and
  wide ones are shrunk. With `classes` a legend of those that occur is below.
  """
  columns = [c for c in (images, labels, predictions) if c is not None]
  counts = [len(column) for column in columns]
  fits = counts[0] > 0 and len(set(counts)) == 1
  require(fits, 'a panel needs at least one image and as many maps', counts)
  rows: list[list[np.ndarray]] = []
  for image, *maps in zip(*columns, strict=True):
    painted = [colorize(label, palette, ignore_label) for label in maps]
    row = [_checked_image(image, *maps), *painted]
    if names is not None:
      miou = mious[len(rows)] if mious is not None else np.nan
      score = '' if np.isnan(miou) else f', mIoU {100 * miou:.1f} %'
      titles = [f'image {names[len(rows)]}', 'label', f'prediction{score}']
      titles = titles[: len(maps)] + titles[-1:]
      row = [_titled(*each) for each in zip(row, titles, strict=True)]
    rows.append(row)
  sheet = grid(rows, _LINE)
  if classes is None:
    return sheet
  present = np.unique(
    np.concatenate([np.ravel(x) for c in columns[1:] for x in c])
  )
  entries = [
    ('void', VOID_COLOR) if i == ignore_label else (classes[i], palette[i])
    for i in present.tolist()
  ]
  width = sheet.shape[1]
  strip = legend(entries, width, max(13, width // 72))
  return grid([[sheet], [strip]], _LINE)


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
  """Writes a title above a picture, which has at most `_WIDEST` columns."""
  height, width = picture.shape[:2]
  if width > _WIDEST:
    size = _WIDEST, max(1, height * _WIDEST // width)
    shown = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
    picture = np.asarray(shown)
  width = picture.shape[1]
  strip = legend([(title, None)], width, max(13, width // 24))
  return grid([[strip], [picture]], 0)


def legend(
  entries: Sequence[tuple[str, Sequence[int] | None]],
  width: int,
  size: int = 13,
) -> np.ndarray:
  """Draws texts beside boxes of color, in aligned columns on white.

  A text with the color None has no box. The picture is `width` pixels wide, or
  as wide as its longest entry; the letters are `size` pixels high.
  """
  line, gap = round(1.6 * size), size // 2
  widest = max(text_length(text, size) for text, _ in entries)
  needed = size + int(np.ceil(widest)) + 3 * gap
  width = max(width, needed)
  columns = max(1, (width - gap) // needed)
  rows = -(-len(entries) // columns)
  pitch = (width - gap) // columns
  strip = Image.new('RGB', (width, rows * line + gap), WHITE)
  draw = ImageDraw.Draw(strip)
  for index, (text, color) in enumerate(entries):
    left = gap + index % columns * pitch
    middle = gap // 2 + index // columns * line + line // 2
    if color is not None:
      top = middle - size // 2
      box = (left, top, left + size - 1, top + size - 1)
      draw.rectangle(box, fill=tuple(map(int, color)), outline=_OUTLINE)
      left += size + gap
    draw_text(draw, (left, middle), text, size)
  return np.asarray(strip)


def grid(rows: Sequence[Sequence[np.ndarray]], separator: int) -> np.ndarray:
  """Puts rows of pictures below one another on white.

  The pictures of a row have one height, and no row has more pictures than the
  first. All columns are as wide as the widest picture, with white lines of
  `separator` pixels between.
  """
  tops = np.cumsum([0] + [row[0].shape[0] + separator for row in rows])
  pitch = max(p.shape[1] for row in rows for p in row) + separator
  shape = tops[-1] - separator, pitch * len(rows[0]) - separator, 3
  sheet = np.full(shape, WHITE, np.uint8)
  for top, row in zip(tops, rows, strict=False):
    for column, picture in enumerate(row):
      (height, width), left = picture.shape[:2], column * pitch
      sheet[top : top + height, left : left + width] = picture
  return sheet


def indexed_png(
  label: np.ndarray, palette: np.ndarray, ignore_label: int = 255
) -> bytes:
  """Encodes a label map as a palette PNG (mode P), as VOC stores labels.

  The pixels are class indices, at most 255, and void has `VOID_COLOR`.
  """
  palette = np.asarray(palette, np.uint8)
  label = _checked_label(label, len(palette), ignore_label)
  low, high = label.min(initial=0), label.max(initial=0)
  require(0 <= low <= high <= 255, 'an indexed PNG holds 0..255', [low, high])
  # All 256 colors: Pillow packs pixels into fewer bits for a short palette.
  colors = np.zeros((256, 3), np.uint8)
  colors[: len(palette)] = palette
  if 0 <= ignore_label <= 255:
    colors[ignore_label] = VOID_COLOR
  picture = Image.fromarray(label.astype(np.uint8))
  picture.putpalette(colors.tobytes())
  buffer = io.BytesIO()
  picture.save(buffer, format='PNG')
  return buffer.getvalue()


def encode(
  kind: str, info: DatasetInfo, label: np.ndarray, probabilities: Any = None
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
  rows = zip(info.list_classes(), shares, strict=True)
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


def save_png(path: str | os.PathLike, rgb: np.ndarray) -> None:
  """Writes a picture; the file appears whole or not at all."""
  with replacing(path) as temporary:
    Image.fromarray(_checked_image(rgb)).save(temporary, format='PNG')


def _checked_label(
  label: np.ndarray, num_classes: int, ignore_label: int
) -> np.ndarray:
  label = np.asarray(label)
  fits = label.ndim == 2 and label.dtype.kind in 'iu'
  found = label.dtype.name, *label.shape
  require(fits, 'a label map must hold integers [H, W]', found)
  is_class = (label >= 0) & (label < num_classes)
  strange = label[~is_class & (label != ignore_label)]
  if strange.size:
    raise ValueError(
      f'label value {strange[0]} is neither one of the {num_classes} classes '
      f'nor the ignore label {ignore_label}'
    )
  return label


def as_rgb(image: np.ndarray) -> np.ndarray:
  """Shows an image uint8 or uint16 [H, W, C] as uint8 RGB [H, W, 3].

  It is gray with one channel or two, and the first three channels otherwise.
  16 bits are stretched for each channel from the 2nd to the 98th percentile.
  RGB of 8 bits stays as it is.
  """
  shown = image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
  if image.dtype == np.uint8:
    return shown
  low, high = np.percentile(shown, (2, 98), (0, 1))
  scaled = (shown - low) * (255 / np.maximum(high - low, 1))
  return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _checked_image(image: np.ndarray, *labels: np.ndarray) -> np.ndarray:
  image = np.asarray(image)
  if image.ndim == 3 and image.dtype in (np.uint8, np.uint16):
    image = as_rgb(image)
  found = image.dtype.name, *image.shape
  fits = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
  require(fits, 'an image must be uint8 [H, W, 3]', found)
  sizes = [np.shape(picture)[:2] for picture in (image, *labels)]
  rule = 'image and label maps must have one size'
  require(len(set(sizes)) == 1, rule, sizes)
  return image
