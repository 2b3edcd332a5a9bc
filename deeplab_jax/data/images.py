"""Pictures as a viewer shows them, from any image file and from records."""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from deeplab_jax.data import bands, image_files
from deeplab_jax.data.datasets import DatasetInfo
from deeplab_jax.data.image_files import IMAGE_SUFFIXES, Path, Unusable
from deeplab_jax.data.transforms import RGB_FILL
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.runtime.files import near_file

_DARK = 2**14  # 16 bits with no value from here on are probably fewer
_BAND = 1024  # rows that are converted at a time
_HALF_TRANSPARENT = 0.1  # share of pixels, more than smooth edges have


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """An image file, read."""

  pixels: np.ndarray  # uint8 RGB [H, W, 3] as shown, or as stored
  orientation: int  # the EXIF orientation that was applied, 1 to 8
  data: bytes  # of the file

  def storable(self) -> bytes:
    """Returns a record of these pixels, which is the file if possible."""
    if self.data.startswith((b'\xff\xd8', b'\x89PNG')):
      found = image_files.decode(self.data, cv2.IMREAD_COLOR_RGB)
      # Decoders may round differently by one. OpenCV ignores transparency,
      # which is a larger difference.
      if (
        found is not None
        and (found.shape, found.dtype) == (self.pixels.shape, self.pixels.dtype)
        and cv2.absdiff(found, self.pixels).max(initial=0) <= 1
      ):
        return self.data
    return encode_image(self.pixels)


def read_image(path: Path) -> np.ndarray:
  """Reads an image of any kind in full, uint8 RGB [H, W, 3].

  It looks as in a viewer: gray, CMYK and palette pictures become RGB, 16 bits
  become 8, transparent pixels show a white page, and the EXIF rotation is
  applied. ICC profiles are not. Of several frames, the first is read.

  Raises `UserError` if the file is missing, truncated or no image, or if it is
  unclear which picture is meant: floats, 32 bits, 12 bits in 16, channels that
  are neither color nor alpha, many half-transparent pixels, or several pages.
  """
  return open_picture(path).pixels


def as_pixels(image: Any, info: DatasetInfo | None = None) -> np.ndarray:
  """Returns a picture as uint8 RGB [H, W, 3].

  It is the path or the bytes of a file, read by `read_image`, or a PIL image or
  an array uint8 [H, W, 3], taken as they are. Raises `UserError` for all else.

  If `info` says that images are kept as they are stored, they are as theirs.
  """
  like, stored = (info.fill, bool(info.mean)) if info else (RGB_FILL, False)
  name = ''
  if isinstance(image, str | os.PathLike):
    name, image = f'{image}: ', open_picture(image, as_stored=stored).pixels
  elif isinstance(image, bytes):
    image = open_picture('image', image, as_stored=stored).pixels
  elif isinstance(image, Image.Image) and not stored:
    if image.mode[0] in 'IF':  # Pillow would clip them
      with image_files.reading('image', b''):
        image = Image.fromarray(_deep_gray(image, image.mode))
    image = image.convert('RGB')
  image = np.asarray(image)
  fits = (image.shape[2:] or (1,)) == like.shape and 0 not in image.shape
  if not fits or image.ndim < 2 or image.dtype != like.dtype:
    raise UserError(
      f'{name}an image must be {like.dtype} [H, W, {len(like)}] for this '
      'network, or a path, bytes or a PIL image, got '
      f'{image.dtype} {list(image.shape)}'
    )
  return image[..., None] if image.ndim == 2 else image


def open_picture(
  path: Path,
  data: bytes | None = None,
  *,
  as_stored: bool = False,
  to_cut: bool = False,
) -> Picture:
  """Reads an image as `read_image` does; `data` is the file, if at hand.

  With `as_stored` it keeps its own channels and bits, see `bands.read_stored`.
  For `to_cut` see `image_files.opened`.
  """
  if as_stored:
    return Picture(*bands.read_stored(path, data, to_cut=to_cut))
  path, data = image_files.contents(path, data)
  with image_files.opened(path, data, to_cut=to_cut) as image:
    data = pathlib.Path(path).read_bytes() if data is None else data
    _refuse_pages(image)
    image_files.refuse_extra_channels(image)
    raw, tags = image_files.raw_mode(image), getattr(image, 'tag_v2', {})
    white_is_zero = tags.get(262) == 0
    orientation, to_turn = image_files.load(image)
    if image.mode.startswith('I') or image.mode == 'F':
      gray = _deep_gray(image, raw)
      gray = 255 - gray if white_is_zero else gray
      pixels = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
    else:
      pixels = _to_rgb(image)
      dark = pixels.max(initial=0) < _DARK >> 8
      if dark and ';16' in raw and image.format in ('PNG', 'TIFF'):
        deep = image_files.decode(data, cv2.IMREAD_UNCHANGED)
        top = _DARK - 1 if deep is None else int(deep[..., :3].max(initial=0))
        _refuse_dark(top)
  return Picture(image_files.turn(pixels, to_turn), orientation, data)


def read_size(
  path: Path,
  data: bytes | None = None,
  *,
  as_stored: bool = False,
  to_cut: bool = False,
) -> tuple[int, int]:
  """Returns (height, width) by the head of an image file, or `UserError`."""
  if as_stored and (size := bands.read_size(path, data, to_cut=to_cut)):
    return size
  with image_files.opened(path, data, to_cut=to_cut) as image:
    # That of a TIFF is upright already.
    turned = image.format != 'TIFF' and image_files.orientation(image) >= 5
    return image.size if turned else image.size[::-1]


def _refuse_pages(image: Image.Image) -> None:
  """Refuses a TIFF whose second page is as large: which one is the image?"""
  if isinstance(image, TiffImageFile) and image.n_frames > 1:
    width, height = size = image.size
    image.seek(1)
    # Bits of the tag mark a smaller version and a mask.
    alike = image.size == size and not image.tag_v2.get(254, 0) & 5
    image.seek(0)
    if alike:
      raise Unusable(f'{image.n_frames} pages of {width}x{height}; store one')


def _deep_gray(image: Image.Image, raw: str) -> np.ndarray:
  """Returns gray of more than 8 bits, a loaded picture, as uint8 [H, W]."""
  values = np.array(image)
  # The head of a PPM says how many bits it has, and Pillow scales them.
  scaled = image.format == 'PPM' and image.mode != 'F'
  if not image.mode.startswith('I;16') and not scaled:
    kind = 'float' if image.mode == 'F' else '32-bit or signed'
    raise Unusable(
      f'{kind} pixels (mode {image.mode}) from {np.nanmin(values):.6g} to '
      f'{np.nanmax(values):.6g}, where nothing says what is black and what is '
      'white; store 8 bits, 0 to 255'
    )
  if raw == 'I;12':
    return (values >> 4).astype(np.uint8)
  if not scaled:
    _refuse_dark(values.max(initial=0))
  gray = (values >> 8).astype(np.uint8)
  clear = image.info.get('transparency')
  if isinstance(clear, int):
    gray[values == clear] = 255
  return gray


def _refuse_dark(top: int) -> None:
  """Refuses 16 bits a channel of which the upper two are not used."""
  if 0 < top < _DARK:
    raise Unusable(
      f'16 bits a channel, but no value above {top}, so it probably holds 14 '
      'bits or fewer; store 8 bits, or use the whole range of 16'
    )


def _to_rgb(image: Image.Image) -> np.ndarray:
  """Returns a loaded picture of 8 bits a channel as uint8 RGB [H, W, 3]."""
  transparent = image.mode in ('LA', 'PA', 'La', 'RGBA', 'RGBa')
  if transparent or 'transparency' in image.info:
    if image.mode == 'La':
      image = image.convert('LA')
    image = image.convert('RGBA')
    alpha = np.array(image.getchannel('A'))
    half = np.mean((alpha > 0) & (alpha < 255))
    if half > _HALF_TRANSPARENT or not alpha.any():
      kind = f'{half:.0%} of its pixels are half' if half else 'all of it is'
      raise Unusable(f'{kind} transparent; store what it shows without alpha')
    page = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(page, image)
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  for top in range(0, image.height, _BAND):  # Pillow's copies take memory
    bottom = min(top + _BAND, image.height)
    band = image.crop((0, top, image.width, bottom))
    pixels[top:bottom] = np.asarray(band.convert('RGB'))
  return pixels


def decode_image(data: bytes) -> np.ndarray:
  """Decodes a record's image, RGB or as stored; else `ValueError`."""
  if data.startswith(bands.RECORD):
    return bands.decode_stored(data)
  image = image_files.decode(data, cv2.IMREAD_COLOR_RGB)
  if image is None:
    raise ValueError(f'{len(data)} bytes that are no image')
  return image


def decode_label(data: bytes) -> np.ndarray:
  """Decodes a record's label, a gray PNG, uint8 [H, W]; else `ValueError`."""
  label = image_files.decode(data, cv2.IMREAD_UNCHANGED)
  if label is None or label.ndim != 2 or label.dtype != np.uint8:
    raise ValueError(f'{len(data)} bytes that are no gray image of 8 bits')
  return label


def encode_image(image: np.ndarray) -> bytes:
  """Returns a record: of uint8 RGB [H, W, 3] a PNG; of others see `bands`."""
  if image.dtype != np.uint8 or image.shape[2] != 3:
    return bands.encode_stored(image)
  return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


def encode_label(label: np.ndarray) -> bytes:
  """Returns class indices uint8 [H, W] as a gray PNG."""
  # Rows without a filter decode in half the time, and are smaller.
  options = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 6),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
  )
  return cv2.imencode('.png', label, options)[1].tobytes()


def list_images(
  inputs: Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES
) -> list[pathlib.Path]:
  """Lists image files, each once, in the order of `inputs`.

  Inputs are files of any name, folders (searched recursively for image files,
  sorted, without hidden ones) or globs ('photos/*.jpg', '**' recursive). Raises
  `UserError` if one is not there, or holds no image.
  """
  found: list[pathlib.Path] = []
  for text in inputs:
    path = pathlib.Path(text).expanduser()
    if path.is_file():
      files = [path]
    elif path.exists():
      files = _images_below(path, suffixes)
    elif glob.has_magic(text):
      matches = map(pathlib.Path, sorted(glob.glob(str(path), recursive=True)))
      files = [file for x in matches for file in _images_below(x, suffixes)]
    else:
      raise UserError(f'{text}: no such file or folder{near_file(path)}')
    if not files:
      known = ' '.join(suffixes)
      raise UserError(f'{text}: no image found (suffixes {known})')
    found += files
  if not found:
    raise UserError('no image given; name files, folders or globs')
  return list(dict.fromkeys(found))


def _images_below(
  path: pathlib.Path, suffixes: Sequence[str]
) -> list[pathlib.Path]:
  """The images in a folder, or the file itself if it is one."""
  files = [] if path.is_dir() else [path]
  for folder, subfolders, names in os.walk(path):
    subfolders[:] = sorted(n for n in subfolders if n[0] != '.')
    files += [pathlib.Path(folder, n) for n in sorted(names) if n[0] != '.']
  return [file for file in files if file.suffix.lower() in suffixes]
