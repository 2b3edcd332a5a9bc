"""Images of any channels and 8 or 16 bits, as they are stored.

They are arrays of NumPy, TIFFs, read by tifffile (the extra 'tiff'), and what
OpenCV reads.
"""

import io
import pathlib
from typing import IO, Any

import cv2
import numpy as np

from deeplab_jax.data import image_files
from deeplab_jax.data.image_files import Path, Unusable
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import check_regular

SUFFIXES = (*image_files.IMAGE_SUFFIXES, '.npy')
RECORD = b'bands'  # begins a record; the number of channels follows
_MOST_CHANNELS = 128  # that OpenCV resizes
_TIFF = b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'


def read_stored(
  path: Path, data: bytes | None = None, *, to_cut: bool = False
) -> tuple[np.ndarray, int, bytes]:
  """Reads an image with the channels and the bits of its file.

  They are those of an array [H, W] or [H, W, C], the samples of a TIFF, or
  gray, gray and alpha, RGB or RGBA. `data` is the file, if at hand.

  Returns the pixels uint8 or uint16 [H, W, C], upright, the EXIF orientation
  that was applied, and the file. Raises `UserError` if it is missing or
  damaged, or has other values or several pages.
  """
  path, data = image_files.contents(path, data)
  with image_files.reading(path, data):
    if data is None:
      check_regular(path, image_files.MOST_BYTES)
      data = pathlib.Path(path).read_bytes()
    if data.startswith(image_files.ARRAY):
      pixels, orientation = np.load(io.BytesIO(data), allow_pickle=False), 1
    elif data.startswith(_TIFF):
      series, orientation = _open_tiff(path, io.BytesIO(data), to_cut)
      try:
        pixels = series.asarray()
      except Exception as error:  # of each compression its own
        raise image_files.unreadable(path, error) from error
      pixels = pixels if series.axes[0] == 'Y' else np.moveaxis(pixels, 0, -1)
    else:
      pixels, orientation = _by_opencv(path, data, to_cut)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    fits = pixels.ndim == 3 and 0 < pixels.shape[2] <= _MOST_CHANNELS
    if not fits or pixels.dtype.kind != 'u' or pixels.itemsize > 2:
      raise Unusable(
        f'{pixels.dtype} {list(pixels.shape)}; store uint8 or uint16 [H, W, C]'
        f' of at most {_MOST_CHANNELS} channels'
      )
    height, width, channels = pixels.shape
    # As a record has them.
    image_files.check_pixels(width, height * channels, to_cut=to_cut)
    pixels = pixels.astype(f'uint{8 * pixels.itemsize}', copy=False)
    return image_files.turn(pixels, orientation), orientation, data


def read_size(
  path: Path, data: bytes | None = None, *, to_cut: bool = False
) -> tuple[int, int] | None:
  """Returns (height, width) by the head of an array or a TIFF; else None."""
  path, data = image_files.contents(path, data)
  with image_files.reading(path, data):
    if data is None:
      check_regular(path, image_files.MOST_BYTES)
    with open(path, 'rb') if data is None else io.BytesIO(data) as file:
      start = file.read(len(image_files.ARRAY))
      file.seek(0)
      if start == image_files.ARRAY:
        version = 1 if np.lib.format.read_magic(file) == (1, 0) else 2
        read = getattr(np.lib.format, f'read_array_header_{version}_0')
        height, width = read(file)[0][:2]
      elif start.startswith(_TIFF):
        series, orientation = _open_tiff(path, file, to_cut)
        axes = 'XY' if orientation >= 5 else 'YX'
        height, width = (series.shape[series.axes.index(x)] for x in axes)
      else:
        return None
      image_files.check_pixels(width, height, to_cut=to_cut)
  return height, width


def _by_opencv(path: Path, data: bytes, to_cut: bool) -> tuple[np.ndarray, int]:
  with image_files.opened(path, data, to_cut=to_cut) as image:
    orientation, _ = image_files.load(image)  # finds damage
    pixels = image_files.decode(data, cv2.IMREAD_UNCHANGED)
    if pixels is None:
      raise Unusable(f'{image.format} is not read as stored; store a PNG')
  if image.format == 'PNG' and data[25] == 4:  # gray and alpha
    pixels = pixels[..., [0, 3]]
  elif pixels.ndim == 3:  # blue comes first
    pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
  return pixels, orientation


def _open_tiff(path: Path, file: IO[bytes], to_cut: bool) -> tuple[Any, int]:
  """Reads the head of a TIFF: its image for `asarray`, and the orientation."""
  try:
    import tifffile  # the extra 'tiff', with imagecodecs for compressed ones
  except ImportError as error:
    raise UserError(
      f"{path}: to read TIFFs as stored, pip install 'deeplab_jax[tiff]'"
    ) from error
  series = tifffile.TiffFile(file).series[0]
  if series.axes not in ('YX', 'YXS', 'YXC', 'SYX', 'CYX'):
    raise Unusable(f'axes {series.axes} {list(series.shape)}; store one page')
  width = max(series.shape[series.axes.index('X')], 1)
  image_files.check_pixels(width, series.size // width, to_cut=to_cut)
  tag = series.keyframe.tags.get(274)
  return series, int(tag.value) if tag else 1


def encode_stored(image: np.ndarray) -> bytes:
  """Returns uint8 or uint16 [H, W, C] without loss, for `decode_stored`.

  That is a gray PNG of the channels below one another, after six bytes.
  """
  gray = np.moveaxis(image, -1, 0).reshape(-1, image.shape[1])
  png = cv2.imencode('.png', gray)[1].tobytes()
  return RECORD + bytes([image.shape[2]]) + png


def decode_stored(data: bytes) -> np.ndarray:
  """Decodes what `encode_stored` made; `ValueError` if it is damaged."""
  start = len(RECORD) + 1
  gray = image_files.decode(data[start:], cv2.IMREAD_UNCHANGED)
  if gray is None or gray.ndim != 2 or len(gray) % (count := data[start - 1]):
    raise ValueError(f'{len(data)} bytes that are no image')
  stacked = gray.reshape(count, -1, gray.shape[1])
  return np.ascontiguousarray(np.moveaxis(stacked, 0, -1))


def kind_of(image: np.ndarray) -> str:
  """Names the kind of an image [H, W, C]: '4 channels of 16 bits'."""
  return f'{image.shape[-1]} channels of {8 * image.itemsize} bits'
