"""Images and labels from files, as a viewer would show them."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from deeplab_jax import errors

IMAGE_SUFFIXES = (
  '.jpg', '.jpeg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm',
  '.pgm',
)  # fmt: skip

# What PIL's many format readers raise on damaged files.
_BROKEN = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  IndexError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)

_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap the sides

# PIL spreads gray PNGs of 2 and 4 bits over 0..255; indices need them as stored
_GRAY_SCALE = {'L;2': 85, 'L;4': 17}


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads an image of any kind whole, the way a viewer shows it.

  Gray, CMYK and palette pictures become RGB, 16 bits become 8, transparency
  lies on white, and the EXIF rotation is applied. ICC profiles are not.

  Args:
    path: an image file of any format PIL reads; of several frames, the first.

  Returns:
    uint8 RGB [H, W, 3].

  Raises:
    UserError: if the file is missing, truncated or no image.
  """
  return _decode_any(_read_bytes(path), path)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
  """Returns the (height, width) of `read_image`'s picture; decodes nothing.

  Raises:
    UserError: if the file is missing or no image.
  """
  try:
    with Image.open(io.BytesIO(_read_bytes(path))) as image:
      width, height = image.size
      turned = (
        image.getexif().get(ExifTags.Base.Orientation, 1) in _QUARTER_TURNS
      )
  except _BROKEN as error:
    raise _unreadable(path, error) from error
  return (width, height) if turned else (height, width)


def read_label(
  path: str | os.PathLike[str], data: bytes | None = None
) -> np.ndarray:
  """Reads a palette or gray PNG as class indices, uint8 [H, W].

  Args:
    path: an image file whose palette indices or gray values are the labels.
    data: its contents, if they are at hand.

  Raises:
    UserError: if the file is missing, truncated, no image, holds colours
      instead of indices, or a value above 255.
  """
  data = _read_bytes(path) if data is None else data
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode, tile = image.mode, image.tile
      image.load()
      label = np.array(image)
  except _BROKEN as error:
    raise _unreadable(path, error) from error
  if label.ndim != 2 or mode not in ('P', 'L', '1', 'I', 'I;16', 'I;16B'):
    raise errors.UserError(
      f'{path}: a label must be a palette or gray PNG of class indices, but '
      f'its mode is {mode}; convert its colours to indices'
    )
  if label.size and (label.max() > 255 or label.min() < 0):
    value = label.max() if label.max() > 255 else label.min()
    raise errors.UserError(
      f'{path}: label value {value} is not in 0..255; store class indices'
    )
  scale = _GRAY_SCALE.get(tile[0][3], 1) if mode == 'L' and tile else 1
  return label.astype(np.uint8) // np.uint8(scale)


def read_mat_label(
  path: str | os.PathLike[str], data: bytes | None = None
) -> np.ndarray:
  """Reads the class mask in one of SBD's MATLAB files, uint8 [H, W].

  Args:
    path: a `.mat` that holds `GTcls.Segmentation`.
    data: its contents, if they are at hand.

  Raises:
    UserError: if the file is missing, damaged or of another structure.
  """
  import scipy.io  # imported here, as few need it

  data = _read_bytes(path) if data is None else data
  try:
    values = scipy.io.loadmat(io.BytesIO(data), variable_names=['GTcls'])
  except Exception as error:  # damaged files make scipy raise almost anything
    raise _unreadable(path, error) from error
  try:
    mask = values['GTcls']['Segmentation'][0, 0]
    label = mask.astype(np.uint8)
    if label.ndim != 2 or not np.array_equal(label, mask):
      raise TypeError
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    raise errors.UserError(
      f'{path}: a mask of SBD must hold GTcls.Segmentation, a matrix of class '
      "indices; take the files in 'cls', as benchmark.tgz has them"
    ) from error
  return label


def label_palette(path: str | os.PathLike[str]) -> np.ndarray | None:
  """Returns the palette of a palette image, uint8 [N, 3], or None."""
  try:
    with Image.open(path) as image:
      palette = image.getpalette('RGB') if image.mode == 'P' else None
  except _BROKEN as error:
    raise _unreadable(path, error) from error
  if palette is None:
    return None
  return np.array(palette, np.uint8).reshape(-1, 3)


def decode_image(data: bytes) -> np.ndarray:
  """Decodes a stored record's image, uint8 RGB [H, W, 3].

  Raises:
    ValueError: if `data` is no image.
  """
  flags = cv2.IMREAD_COLOR_RGB
  image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
  if image is None:
    raise ValueError(f'{len(data)} bytes that are no image')
  return image


def decode_label(data: bytes) -> np.ndarray:
  """Decodes a stored record's label, a gray PNG, as uint8 [H, W].

  Raises:
    ValueError: if `data` is no gray image of 8 bits.
  """
  flags = cv2.IMREAD_UNCHANGED
  label = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
  if label is None or label.ndim != 2 or label.dtype != np.uint8:
    raise ValueError(f'{len(data)} bytes that are no gray image of 8 bits')
  return label


def encode_image(image: np.ndarray) -> bytes:
  """Returns uint8 RGB [H, W, 3] as a PNG."""
  return cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[
    1
  ].tobytes()


def encode_label(label: np.ndarray) -> bytes:
  """Returns class indices uint8 [H, W] as a gray PNG."""
  # Unfiltered rows decode in half the time, and pack better.
  return cv2.imencode(
    '.png',
    label,
    (
      *(cv2.IMWRITE_PNG_COMPRESSION, 6),
      *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
      *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
    ),
  )[1].tobytes()


def storable_image(
  path: str | os.PathLike[str], data: bytes | None = None
) -> tuple[bytes, tuple[int, int]]:
  """Returns bytes that `decode_image` turns into `read_image`'s picture.

  The file's own bytes if they are a JPEG or PNG that does, else a PNG.

  Args:
    path: an image file.
    data: its contents, if they are at hand.

  Returns:
    The bytes, and the picture's height and width.

  Raises:
    UserError: as `read_image`.
  """
  data = _read_bytes(path) if data is None else data
  image = _decode_any(data, path)
  size = image.shape[:2]
  if data.startswith((b'\xff\xd8', b'\x89PNG')):
    # Decoders may round differently by one; IMREAD_COLOR drops transparency
    # and knows no white page, which shows as a larger difference.
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if decoded is not None and decoded.shape == image.shape:
      difference = cv2.absdiff(decoded, image)
      if difference.max(initial=0) <= 1:
        return data, size
  return encode_image(image), size


def list_images(inputs: Sequence[str]) -> list[pathlib.Path]:
  """Lists image files, each once, in the order of `inputs`.

  Args:
    inputs: files of any name, folders (searched recursively for image files,
      sorted, hidden ones left out) or globs ('photos/*.jpg', '**' recursive).

  Raises:
    UserError: if an input is not there, or holds no image.
  """
  found: dict[pathlib.Path, None] = {}
  for text in inputs:
    path = pathlib.Path(text).expanduser()
    if path.exists():
      files = _images_below(path)
    elif glob.has_magic(text):
      matches = sorted(glob.glob(str(path), recursive=True))
      files = [
        file
        for match in map(pathlib.Path, matches)
        if match.is_dir() or match.suffix.lower() in IMAGE_SUFFIXES
        for file in _images_below(match)
      ]
    else:
      raise errors.UserError(f'{text}: no such file or folder')
    if not files:
      raise errors.UserError(
        f'{text}: no image found (suffixes {" ".join(IMAGE_SUFFIXES)})'
      )
    found.update(dict.fromkeys(files))
  if not found:
    raise errors.UserError('no image given; name files, folders or globs')
  return list(found)


def _images_below(path: pathlib.Path) -> list[pathlib.Path]:
  if not path.is_dir():
    return [path]
  found = []
  for folder, subfolders, names in os.walk(path):
    subfolders[:] = sorted(n for n in subfolders if not n.startswith('.'))
    found += [
      pathlib.Path(folder, name)
      for name in sorted(names)
      if not name.startswith('.')
      and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    ]
  return found


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except FileNotFoundError as error:
    raise errors.UserError(f'{path}: no such file') from error
  except OSError as error:
    raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> Exception:
  reason = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, Image.UnidentifiedImageError):
    reason = 'no image format that is known'
  return errors.UnreadableError(
    f'{path}: unreadable image ({reason}); replace the file or take it out'
  )


def _decode_any(data: bytes, path: str | os.PathLike[str]) -> np.ndarray:
  """Decodes any image format with PIL; `path` is for the error alone."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
      with contextlib.suppress(*_BROKEN):  # broken EXIF hides no picture
        image = ImageOps.exif_transpose(image)
      return _to_rgb(image)
  except _BROKEN as error:
    raise _unreadable(path, error) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
  """Returns a loaded picture of any PIL mode as uint8 RGB [H, W, 3]."""
  if image.mode.startswith('I'):  # 16-bit gray; convert() would clip, not scale
    gray = np.clip(np.array(image).astype(np.int64), 0, 65535) >> 8
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)
  if image.mode in ('LA', 'PA', 'La', 'RGBA', 'RGBa') or (
    'transparency' in image.info
  ):
    image = image.convert('RGBA')
    page = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(page, image)
  return np.array(image.convert('RGB'))
