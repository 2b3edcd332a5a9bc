"""Label maps as pictures: palette PNGs, overlays with a legend, panels."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.runtime.files import replacing
from deeplab_jax.visualize.lettering import draw_text, text_length

VOID_COLOR = (224, 224, 192)
_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_OUTLINE = (144, 144, 144)


def colorize(
  label: np.ndarray, palette: np.ndarray, ignore_label: int = 255
) -> np.ndarray:
  """Paints every class in its colour and void in the light one of VOC.

  Args:
    label: int [H, W], classes 0..C-1 or `ignore_label`.
    palette: uint8 [C, 3], the colour of each class.
    ignore_label: the label that means void.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the label holds another value.
  """
  palette = np.asarray(palette, np.uint8)
  label = _checked(label, len(palette), ignore_label)
  void = label == ignore_label
  colors = palette[np.where(void, 0, label)]
  colors[void] = VOID_COLOR
  return colors


def class_shares(
  label: np.ndarray, num_classes: int, ignore_label: int = 255
) -> np.ndarray:
  """Computes each class's share of the pixels that are not void.

  Args:
    label: int [H, W], classes 0..C-1 or `ignore_label`.
    num_classes: the number of classes C.
    ignore_label: the label that means void.

  Returns:
    float64 [C] with the sum 1, or all 0 if every pixel is void.

  Raises:
    ValueError: if the label holds another value.
  """
  label = _checked(label, num_classes, ignore_label)
  counts = np.bincount(label[label != ignore_label], minlength=num_classes)
  return counts / max(counts.sum(), 1)


def overlay(
  image: np.ndarray,
  label: np.ndarray,
  palette: np.ndarray,
  classes: Sequence[str],
  opacity: float = 0.5,
  ignore_label: int = 255,
) -> np.ndarray:
  """Lays the class colours over the image, with a legend below it.

  Fine light lines part the classes, so that dark colours stay apart as well.
  The legend names the classes that occur, the largest first, with their share
  of the pixels that are not void. It takes as many rows as it needs; where the
  image is narrower than an entry, the picture is widened with white.

  Args:
    image: uint8 [H, W, 3].
    label: int [H, W], classes 0..C-1 or `ignore_label`; void stays clear.
    palette: uint8 [C, 3], the colour of each class.
    classes: the C class names.
    opacity: weight of the class colour, 0..1.
    ignore_label: the label that means void.

  Returns:
    uint8 [H', W', 3] with H' >= H and W' >= W; the picture is the upper left
    [H, W], pixel for pixel in the size of the image.

  Raises:
    ValueError: if sizes or types do not fit together, or the label holds a
      value that is neither a class nor `ignore_label`.
  """
  image, palette = _rgb(image), np.asarray(palette, np.uint8)
  if np.shape(label) != image.shape[:2]:
    raise ValueError(
      f'image and label must have one size, got {list(image.shape[:2])} and '
      f'{list(np.shape(label))}'
    )
  if len(classes) != len(palette):
    raise ValueError(
      f'{len(classes)} class names for {len(palette)} palette colours'
    )
  if not 0 <= opacity <= 1:
    raise ValueError(f'opacity must be in 0..1, got {opacity}')
  painted = _paint(image, label, palette, opacity, ignore_label)
  shares = class_shares(label, len(palette), ignore_label)
  entries = [
    (
      f'{classes[index]} {_percent(shares[index])}',
      palette[index].tolist(),
    )
    for index in np.argsort(-shares, kind='stable')
    if shares[index] > 0
  ]
  if not entries:
    return painted
  size = max(13, max(image.shape) // 64)
  return _stack(painted, legend(entries, image.shape[1], size))


def panel(
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray] | None,
  predictions: Sequence[np.ndarray],
  palette: np.ndarray,
  ignore_label: int = 255,
  separator: int = 4,
) -> np.ndarray:
  """Sets image, label and prediction side by side, one row per image.

  Args:
    images: N images, each uint8 [H, W, 3]; sizes may differ between images.
    labels: N maps int [H, W], or None for rows of image and prediction.
    predictions: N maps int [H, W].
    palette: uint8 [C, 3], the colour of each class.
    ignore_label: the label that means void, shown in `VOID_COLOR`.
    separator: width of the white lines between pictures, in pixels.

  Returns:
    uint8 [H', W', 3].

  Raises:
    ValueError: if the numbers or sizes do not agree, or there is no image.
  """
  maps = [predictions] if labels is None else [labels, predictions]
  if len(images) == 0 or any(len(column) != len(images) for column in maps):
    raise ValueError(
      'a panel needs at least one image and as many maps, got '
      f'{[len(column) for column in (images, *maps)]}'
    )
  rows = []
  for image, *row_maps in zip(images, *maps, strict=True):
    row = [_rgb(image)]
    row += [colorize(label, palette, ignore_label) for label in row_maps]
    if len({picture.shape for picture in row}) > 1:
      raise ValueError(
        'image, label and prediction must have one size, got '
        f'{[list(picture.shape[:2]) for picture in row]}'
      )
    rows.append(row)
  return grid(rows, separator)


def legend(
  entries: Sequence[tuple[str, Sequence[int] | None]],
  width: int,
  size: int = 13,
) -> np.ndarray:
  """Draws texts after boxes of colour, in columns of one width.

  Args:
    entries: pairs of text, in any script, and RGB colour; None for text alone.
    width: of the strip in pixels; more if an entry needs it.
    size: of the letters in pixels.

  Returns:
    uint8 [H, W, 3] on white.
  """
  line, gap = round(1.6 * size), size // 2
  widths = [size + gap + int(np.ceil(text_length(t, size))) for t, _ in entries]
  width = max(width, max(widths) + 2 * gap)
  # Columns of one width line up, which reads better than a ragged flow.
  columns = max(1, (width - gap) // (max(widths) + 2 * gap))
  rows = -(-len(entries) // columns)
  pitch = (width - gap) // columns
  strip = Image.new('RGB', (width, rows * line + gap), _PAPER)
  draw = ImageDraw.Draw(strip)
  for index, (text, color) in enumerate(entries):
    left = gap + index % columns * pitch
    middle = gap // 2 + index // columns * line + line // 2
    if color is not None:
      top = middle - size // 2
      box = (left, top, left + size - 1, top + size - 1)
      draw.rectangle(box, fill=tuple(color), outline=_OUTLINE)
      left += size + gap
    draw_text(draw, (left, middle), text, _INK, size)
  return np.asarray(strip)


def grid(rows: Sequence[Sequence[np.ndarray]], separator: int) -> np.ndarray:
  """Sets rows of equally large pictures under one another on white.

  Args:
    rows: pictures uint8 [H, W, 3], those of a row in one size; no row has more
      than the first.
    separator: width of the white lines between pictures, in pixels.

  Returns:
    uint8 [H', W', 3].
  """
  heights = [row[0].shape[0] for row in rows]
  pitch = max(row[0].shape[1] for row in rows) + separator
  height = sum(heights) + separator * (len(rows) - 1)
  shape = (height, pitch * len(rows[0]) - separator, 3)
  sheet = np.full(shape, _PAPER, np.uint8)
  top = 0
  for row, height in zip(rows, heights, strict=True):
    for column, picture in enumerate(row):
      left = column * pitch
      sheet[top : top + height, left : left + picture.shape[1]] = picture
    top += height + separator
  return sheet


def save_indexed_png(
  path: str | os.PathLike,
  label: np.ndarray,
  palette: np.ndarray,
  ignore_label: int = 255,
) -> None:
  """Writes `indexed_png`; the file appears whole or not at all."""
  _save(path, indexed_png(label, palette, ignore_label))


def indexed_png(
  label: np.ndarray, palette: np.ndarray, ignore_label: int = 255
) -> bytes:
  """Encodes a label map as the palette PNG (mode P) that VOC uses.

  The pixel values are the class indices.

  Args:
    label: int [H, W], classes 0..C-1 or `ignore_label`, all within 0..255.
    palette: uint8 [C, 3], the colour of each class, C at most 256.
    ignore_label: the label that means void, shown in `VOID_COLOR`.

  Raises:
    ValueError: if the label holds another value or one beyond 0..255.
  """
  palette = np.asarray(palette, np.uint8)
  label = _checked(label, len(palette), ignore_label)
  if label.size and not 0 <= label.min() <= label.max() <= 255:
    raise ValueError(
      'an indexed PNG holds 0..255, got labels from '
      f'{label.min()} to {label.max()}'
    )
  # All 256 colours: Pillow packs pixels into fewer bits for a short palette.
  colors = np.zeros((256, 3), np.uint8)
  colors[: len(palette)] = palette
  if 0 <= ignore_label <= 255:
    colors[ignore_label] = VOID_COLOR
  picture = Image.fromarray(label.astype(np.uint8))
  picture.putpalette(colors.tobytes())
  return _png(picture)


def save_png(path: str | os.PathLike, rgb: np.ndarray) -> None:
  """Writes a picture uint8 [H, W, 3]; it appears whole or not at all."""
  _save(path, _png(Image.fromarray(_rgb(rgb))))


def _png(picture: Image.Image) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, format='PNG')
  return buffer.getvalue()


def _save(path: str | os.PathLike, png: bytes) -> None:
  with replacing(path) as temporary:
    Path(temporary).write_bytes(png)


def _checked(
  label: np.ndarray, num_classes: int, ignore_label: int
) -> np.ndarray:
  label = np.asarray(label)
  if label.ndim != 2 or label.dtype.kind not in 'iu':
    raise ValueError(
      f'a label map must hold integers [H, W], got {label.dtype} '
      f'{list(label.shape)}'
    )
  strange = (label < 0) | (label >= num_classes)
  strange &= label != ignore_label
  if strange.any():
    raise ValueError(
      f'label value {label[strange][0]} is neither one of the {num_classes} '
      f'classes nor the ignore label {ignore_label}'
    )
  return label


def _rgb(image: np.ndarray) -> np.ndarray:
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(
      f'an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}'
    )
  return image


def _paint(
  image: np.ndarray,
  label: np.ndarray,
  palette: np.ndarray,
  opacity: float,
  ignore_label: int,
) -> np.ndarray:
  label = np.asarray(label)
  colors = colorize(label, palette, ignore_label)
  weight = np.where(label == ignore_label, 0, np.float32(opacity))[..., None]
  painted = (1 - weight) * image + weight * colors
  thickness = max(1, max(label.shape) // 800)
  border = np.zeros(label.shape, bool)
  border[:-thickness] |= label[thickness:] != label[:-thickness]
  border[:, :-thickness] |= label[:, thickness:] != label[:, :-thickness]
  painted[border] = 0.4 * painted[border] + 0.6 * np.asarray(_PAPER)
  return np.rint(painted).astype(np.uint8)


def _percent(share: float) -> str:
  return f'{100 * share:.1f}%' if share >= 0.0005 else '<0.1%'


def _stack(picture: np.ndarray, strip: np.ndarray) -> np.ndarray:
  height, width = picture.shape[:2]
  sheet = np.full((height, strip.shape[1], 3), _PAPER, np.uint8)
  sheet[:, :width] = picture
  return np.concatenate([sheet, strip])
