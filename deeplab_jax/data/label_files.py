"""Label files, with all bits as they are stored."""

import dataclasses
import io
from collections.abc import Container
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from deeplab_jax.data import image_files
from deeplab_jax.data.image_files import Path, Unusable
from deeplab_jax.runtime.errors import LabelError, UserError

_SUFFIXES = '.png .tif .tiff .bmp .gif .pgm .ppm .tga'
LABEL_SUFFIXES = tuple(_SUFFIXES.split())
# Pillow's names of the formats that keep every pixel, and of the TIFF
# compressions that do not.
_LOSSLESS = ('PNG', 'TIFF', 'BMP', 'DIB', 'GIF', 'PPM', 'TGA')
_LOSSY_TIFF = ('jpeg', 'tiff_jpeg', 'webp')

_MOST_MAT = 2**20  # bytes, which may unpack to a thousand times as many
# Pillow spreads gray of 2 and 4 bits over 0..255; indices need them as stored.
_GRAY_SCALE = {'L;2': 85, 'L;4': 17}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelFile:
  """A label file, read as it is stored."""

  path: Path
  # uint8 or uint16 [H, W], values or indices, or uint8 [H, W, 3], colors.
  pixels: np.ndarray
  palette: np.ndarray | None  # uint8 [N, 3], the colors of palette indices
  turned: bool  # whether the file has an EXIF orientation, which was applied

  def indices(self, known: Container[Any] = ()) -> np.ndarray:
    """Returns the gray values or indices, [H, W]; colors are `LabelError`.

    So are values above 255, except those in `known`.
    """
    pixels = self.pixels
    if pixels.ndim == 3:
      if not self.is_gray():
        raise LabelError(
          f'{self.path}: a label must be a palette or gray PNG of class '
          'indices, but its mode is RGB; convert its colors to indices, or give'
          ' each class its color in classes.txt, as in "name 255 0 0"'
        )
      pixels = np.ascontiguousarray(pixels[..., 0])
    if pixels.dtype != np.uint8:
      for value in np.unique(pixels[pixels > 255]).tolist():
        if value not in known:
          raise LabelError(
            f'{self.path}: label value {value} is no class index, 0 to 255'
          )
    return pixels

  def is_gray(self) -> bool:
    """Tells whether no pixel has a color: all channels are equal."""
    pixels = self.pixels
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def open_label(
  path: Path, data: bytes | None = None, *, to_cut: bool = False
) -> LabelFile:
  """Reads gray values, palette indices or colors; `data` is the file, if known.

  Of a file .mat it reads the mask of SBD, see `read_mat_label`.
  Raises `UserError` if the file is missing, truncated, no image, of a lossy
  format, of several pages, of a mode that is no label or has values beyond 16
  bits.
  """
  path, data = image_files.contents(path, data)
  if data is not None and str(path).endswith('.mat'):
    return LabelFile(path, read_mat_label(path, data), None, turned=False)
  with image_files.opened(path, data, to_cut=to_cut) as image:
    _refuse_lossy(image)
    if (frames := getattr(image, 'n_frames', 1)) > 1:
      raise Unusable(f'{frames} frames or pages; store only that of the image')
    image_files.refuse_extra_channels(image)
    _refuse_scaled(image)
    raw, palette = image_files.raw_mode(image), None
    orientation, to_turn = image_files.load(image)
    pixels = _label_pixels(image, raw)
    if image.mode == 'P':
      palette = np.array(image.getpalette('RGB'), np.uint8).reshape(-1, 3)
      if image.format == 'GIF':
        _refuse_renumbered(pixels, palette)
  pixels = image_files.turn(pixels, to_turn)
  return LabelFile(path, pixels, palette, turned=orientation != 1)


def _refuse_lossy(image: Image.Image) -> None:
  form, compression = image.format, image.info.get('compression')
  if form == 'TIFF' and compression in _LOSSY_TIFF:
    form = f'TIFF with {compression.removeprefix("tiff_").upper()} compression'
  elif form in _LOSSLESS:
    return
  raise Unusable(
    f'a label must be lossless, this is a {form}, which may change values; '
    'export it as PNG from where it was drawn'
  )


def _refuse_scaled(image: ImageFile) -> None:
  """Refuses a PGM of another maximum than 255, which Pillow scales to it."""
  args = image.tile[0][3] if image.tile else ''
  if image.format != 'PPM' or image.mode == 'F' or not isinstance(args, tuple):
    return
  if args[-1] != 255:
    raise Unusable(
      f'the largest gray value that its header names is {args[-1]}, so values '
      'are shares of it and no indices; write 255 there, or a PNG'
    )


def _refuse_renumbered(pixels: np.ndarray, palette: np.ndarray) -> None:
  """Refuses a gray GIF, whose writers number the gray values in use anew."""
  used = np.unique(pixels)
  used = used[used < len(palette)]
  gray = palette[used]
  if (gray == gray[:, :1]).all() and (gray[:, 0] != used).any():
    raise Unusable(
      'a GIF of gray values stored as other indices, so nothing says which of '
      'them are the classes; store a gray PNG'
    )


def _label_pixels(image: Image.Image, raw: str) -> np.ndarray:
  """Returns a loaded label's indices [H, W] or colors uint8 [H, W, 3]."""
  mode, pixels = image.mode, np.array(image)
  if mode in ('LA', 'RGBA'):
    varies = (pixels[..., -1] != pixels[0, 0, -1]).any()
    if varies and mode == 'RGBA':  # unless each color has an alpha of its own
      codes = np.unique(pixels.view('<u4'))
      varies = len(np.unique(codes & 0xFFFFFF)) < len(codes)
    if varies:
      raise Unusable(f'transparent pixels (mode {mode}); remove the alpha')
    mode = mode[:-1]
    pixels = pixels[..., 0] if mode == 'L' else pixels[..., :3]
  if mode not in ('P', 'L', '1', 'RGB') and not mode.startswith('I'):
    raise Unusable(
      'a label must be a palette or gray PNG of class indices, but its mode is '
      f'{mode}; store class indices'
    )
  for value in (pixels.max(initial=0), pixels.min(initial=0)):
    if not 0 <= value < 2**16:
      raise Unusable(f'label value {value} is no class index, 0 to 255')
  kind = np.uint16 if pixels.max(initial=0) > 255 else np.uint8
  pixels = pixels.astype(kind, copy=False)
  scale = _GRAY_SCALE.get(raw[:3]) if mode == 'L' else None
  return pixels // np.uint8(scale) if scale else pixels


def read_mat_label(path: Path, data: bytes) -> np.ndarray:
  """Reads the mask in a MATLAB file of SBD, `GTcls.Segmentation`, [H, W]."""
  import scipy.io  # imported here, as few need it

  if len(data) > _MOST_MAT:
    raise UserError(f'{path}: {len(data):,} bytes are too many for a mask')
  try:
    values = scipy.io.loadmat(io.BytesIO(data), variable_names=['GTcls'])
  except Exception as error:  # damaged files make scipy raise almost anything
    raise image_files.unreadable(path, error) from error
  try:
    mask = values['GTcls']['Segmentation'][0, 0]
    label = mask.astype(np.uint8)
    if label.ndim != 2 or not np.array_equal(label, mask):
      raise TypeError
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f'{path}: a mask of SBD must hold GTcls.Segmentation, a matrix of class '
      "indices; take the files in 'cls', as benchmark.tgz has them"
    ) from error
  return label
