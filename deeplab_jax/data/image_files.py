"""Image files of any format, opened by Pillow; or why they cannot be used."""

import contextlib
import io
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, features
from PIL.TiffImagePlugin import TiffImageFile

from deeplab_jax.runtime.errors import UnreadableError, UserError
from deeplab_jax.runtime.files import check_regular


class Made(NamedTuple):
  """What stands for an image or label file and is none."""

  origin: str  # names it in messages
  name: str  # as the name of a file, without a folder
  state: tuple[Any, ...]  # plain JSON values; others if the content changes
  read: Callable[[], bytes]  # returns an image file, or raises `UserError`

  def __str__(self) -> str:
    return self.origin


Path: TypeAlias = str | os.PathLike[str] | Any  # or `Made`


def contents(path: Path, data: bytes | None) -> tuple[Path, bytes | None]:
  """Returns a file and `data`; reads what only stands for a file."""
  return (str(path), path.read()) if isinstance(path, Made) else (path, data)


def _built_in(feature: str) -> bool:
  known = feature in (*features.modules, *features.codecs)
  return known and bool(features.check(feature))


# Suffixes of the formats that the installed Pillow reads and viewers show.
IMAGE_SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.gif'),
  *('.tif', '.tiff', '.bmp', '.dib', '.ppm', '.pgm', '.pbm', '.pnm', '.tga'),
  *(('.webp',) if _built_in('webp') else ()),
  *(('.avif',) if _built_in('avif') else ()),
  *(('.jp2', '.j2k', '.jpx', '.jpf') if _built_in('jpg_2000') else ()),
)
# OpenCV decodes no more, so no more can be trained on.
_MOST_PIXELS, _LONGEST_SIDE = 2**30, 2**20
MOST_BYTES = 2**32  # of a file
ARRAY = b'\x93NUMPY'  # begins an array of NumPy
_MOST_TO_CUT = _MOST_PIXELS  # of an image that is cut into tiles
with contextlib.suppress(AttributeError, ValueError, OSError):
  # Reading takes up to 16 bytes a pixel, and may take half of the memory.
  _MEMORY = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  _MOST_PIXELS = min(_MOST_PIXELS, _MEMORY // 32)
  _MOST_TO_CUT = _MEMORY // 12  # one at a time, which takes 8 bytes a pixel
_TIFF_COLORS = {2: 3, 5: 4, 6: 3, 8: 3}  # channels by photometric tag; else 1
# What Pillow's format readers raise on damaged files.
_BROKEN = (
  *(OSError, SyntaxError, ValueError, EOFError, IndexError),
  *(struct.error, zlib.error),
)
# Pillow logs as errors what it raises as well.
logging.getLogger('PIL.TiffImagePlugin').setLevel(logging.CRITICAL)


class Unusable(Exception):
  """Why a file is refused that is not damaged; `opened` adds its name."""


@contextlib.contextmanager
def opened(
  path: Path, data: bytes | None = None, *, to_cut: bool = False
) -> Iterator[ImageFile.ImageFile]:
  """Opens an image; `data` is the contents of the file, if they are at hand.

  One that will be cut into tiles, `to_cut`, may have more pixels.

  Raises `UserError` if it is missing or damaged, or the body raises `Unusable`.
  """
  path, data = contents(path, data)
  with reading(path, data):
    if data is None:
      check_regular(path, MOST_BYTES)
    with (
      # Not by its name: then Pillow 13 mixes up the pixels of a turned TIFF.
      open(path, 'rb') if data is None else io.BytesIO(data) as file,
      _any_size(),
      Image.open(file) as image,
    ):
      known = Image.registered_extensions()
      if image.format not in {known[suffix] for suffix in IMAGE_SUFFIXES}:
        # Pillow starts other programs for some formats.
        raise UnreadableError(
          f'{path}: {image.format} is not read; replace it by a JPEG or PNG'
        )
      check_pixels(*image.size, to_cut=to_cut)
      yield image


def check_pixels(width: int, height: int, *, to_cut: bool = False) -> None:
  """Raises `Unusable` for an image that is too large to be read."""
  most = _MOST_TO_CUT if to_cut else _MOST_PIXELS
  if width * height > most or max(width, height) > _LONGEST_SIDE:
    hint = '' if to_cut else ', as config.data.tile=SIDE does for a data set'
    raise Unusable(
      f'{width}x{height} is too large, at most {most:,} pixels and '
      f'{_LONGEST_SIDE:,} a side are read; cut it into tiles{hint}'
    )


@contextlib.contextmanager
def reading(path: Path, data: bytes | None) -> Iterator[None]:
  """Turns what goes wrong with a file into a `UserError`, see `opened`."""
  try:
    yield
  except UserError:
    raise
  except Unusable as error:
    raise UserError(f'{path}: {error}') from error
  except FileNotFoundError as error:
    raise UserError(f'{path}: no such file') from error
  except Image.UnidentifiedImageError as error:
    if data is None:
      with open(path, 'rb') as file:
        data = file.read(MOST_BYTES // 16)
    raise _unidentified(path, data) from error
  except _BROKEN as error:
    raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnreadableError:
  """Returns the error that says that a file is damaged."""
  reason = ' '.join(str(error).split()) or type(error).__name__
  return UnreadableError(
    f'{path}: unreadable image ({reason}); replace the file or take it out'
  )


_limits: list[int | None] = []
_limits_lock = threading.Lock()


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
  """Lifts Pillow's limit of pixels, which all threads share."""
  with _limits_lock:
    _limits.append(Image.MAX_IMAGE_PIXELS)
    Image.MAX_IMAGE_PIXELS = None
  try:
    yield
  finally:
    with _limits_lock:  # the last thread to leave restores the first value
      Image.MAX_IMAGE_PIXELS = _limits.pop()


def _unidentified(path: Path, data: bytes) -> UserError:
  """Returns the error that says why Pillow opens no image in `data`."""
  if not data:
    return UnreadableError(f'{path}: the file is empty; replace or remove it')
  if data.startswith(ARRAY):
    return UserError(f'{path}: an array; set config.data.as_stored=True')
  kind, values = _tiff_kind(data), None
  if kind:
    with contextlib.suppress(cv2.error):
      values = decode(data, cv2.IMREAD_UNCHANGED)
  if values is not None:  # a whole TIFF of numbers that Pillow does not know
    other = ', or set config.data.as_stored=True' * (values.dtype.kind == 'u')
    return UserError(
      f'{path}: {kind}, from {np.nanmin(values):.6g} to'
      f' {np.nanmax(values):.6g}; gray and RGB of 8 or 16 bits are read: store'
      f' 8 bits, 0 to 255{other}'
    )
  reason = f'TIFF: damaged or unknown, {kind}' if kind else 'damaged or unknown'
  if data[4:11] in (b'ftyphei', b'ftyphev', b'ftypmif'):
    reason = 'HEIC, which is not read'
  return UnreadableError(
    f'{path}: unreadable image ({reason}); replace the file or take it out; '
    f'formats that are read: {" ".join(IMAGE_SUFFIXES)}'
  )


def _tiff_kind(data: bytes) -> str:
  """Names the samples of a TIFF, as '5 samples of 16 bits a pixel'; else ''."""
  with contextlib.suppress(Exception):  # it may be damaged anywhere
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    kind = {1: '', 2: 'signed ', 3: 'float '}[tags.get(339, (1,))[0]]
    bits = tags.get(258, (1,))[0]
    if tags[256] * tags[257] * tags.get(277, 1) * bits > 2**33:
      return ''
    return f'{tags.get(277, 1)} {kind}samples of {bits} bits a pixel'
  return ''


def refuse_extra_channels(image: Image.Image) -> None:
  """Refuses a TIFF with channels that are neither color nor alpha."""
  if isinstance(image, TiffImageFile):
    tags = image.tag_v2
    # Many writers leave out the tag that calls a fourth channel alpha.
    samples, extra = tags.get(277, 1), tags.get(338, (2,))
    known = _TIFF_COLORS.get(tags.get(262, 1), 1)
    known += any(kind in (1, 2, 999) for kind in extra)
    if samples > known:
      raise Unusable(
        f'{samples} channels, {samples - known} of them neither color nor '
        'alpha; store the three that make the picture as RGB, or set'
        ' config.data.as_stored=True'
      )


def decode(data: bytes, flags: int) -> np.ndarray | None:
  """Decodes an image with OpenCV; None if that fails."""
  return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None


def raw_mode(image: ImageFile.ImageFile) -> str:
  """Pillow's name for the pixels in the file; '' once they are loaded."""
  args = image.tile[0][3] if image.tile else ''
  raw = args[0] if isinstance(args, tuple) and args else args
  return raw if isinstance(raw, str) else ''


def orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 to 8, in what was read of the file so far."""
  with contextlib.suppress(*_BROKEN):  # broken EXIF hides no picture
    found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return int(found or 0) if found in range(1, 9) else 1
  return 1


def load(image: Image.Image) -> tuple[int, int]:
  """Loads the pixels; returns the EXIF orientation, and what is left of it."""
  if image.format == 'TIFF':  # which Pillow turns while it loads
    found = orientation(image)
    image.load()
    return found, 1
  image.load()  # before EXIF is read, which may follow the pixels of a PNG
  found = orientation(image)
  return found, found


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
  """Shows an array [H, W, ...] upright that has an EXIF orientation, 1 to 8."""
  if orientation >= 5:
    array = array.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    array = array[:, ::-1]
  if orientation in (3, 4, 7, 8):
    array = array[::-1]
  return np.ascontiguousarray(array)
