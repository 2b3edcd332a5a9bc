"""Images and labels from files, as a viewer would show them."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import logging
import os
import pathlib
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features

from deeplab_jax.runtime import errors
from deeplab_jax.runtime import files as disk


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
LABEL_SUFFIXES = (
  *('.png', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm', '.tga'),
)

# Pillow's names of the formats that keep every pixel, and of the TIFF
# compressions that do not.
_LOSSLESS = ('PNG', 'TIFF', 'BMP', 'DIB', 'GIF', 'PPM', 'TGA')
_LOSSY_TIFF = ('jpeg', 'tiff_jpeg', 'webp')

# What PIL's many format readers raise on damaged files.
_BROKEN = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  IndexError,
  struct.error,
  zlib.error,
)

# PIL spreads gray of 2 and 4 bits over 0..255; indices need them as stored.
_GRAY_SCALE = {'L;2': 85, 'L;4': 17}

# It logs as errors what it raises as well.
logging.getLogger('PIL.TiffImagePlugin').setLevel(logging.CRITICAL)

# OpenCV decodes no more, and so no more can be trained on.
_MOST_PIXELS, _LONGEST_SIDE = 2**30, 2**20

_DARK = 2**14  # 16 bits with no value from here on are probably fewer
_HALF_TRANSPARENT = 0.1  # share of pixels, beyond what smooth edges have
_TIFF_COLORS = {2: 3, 5: 4, 6: 3, 8: 3}  # channels by photometric tag; else 1
_ORIENTATION = ExifTags.Base.Orientation
_QUARTER_TURNS = (5, 6, 7, 8)  # the orientations that swap the sides


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """An image file, read.

  Attributes:
    pixels: uint8 RGB [H, W, 3], as a viewer shows them.
    orientation: the EXIF orientation that was applied, 1 to 8; 1 is none.
    data: the bytes of the file.
  """

  pixels: np.ndarray
  orientation: int
  data: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class LabelFile:
  """A label file, read as it is stored.

  Attributes:
    path: for messages.
    pixels: uint8 [H, W], gray values or palette indices, or [H, W, 3], colors.
    palette: uint8 [N, 3], the colors of palette indices, or None.
    turned: whether the file has an orientation of its own, which was applied.
  """

  path: str | os.PathLike[str]
  pixels: np.ndarray
  palette: np.ndarray | None
  turned: bool

  def indices(self) -> np.ndarray:
    """Returns the pixels, uint8 [H, W]; raises `UserError` for colors."""
    if self.pixels.ndim == 3:
      raise errors.UserError(
        f'{self.path}: a label must be a palette or gray PNG of class indices, '
        'but its mode is RGB; convert its colors to indices, or give each '
        'class its color in classes.txt, as in "name 255 0 0"'
      )
    return self.pixels


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads an image of any kind whole, the way a viewer shows it.

  Gray, CMYK and palette pictures become RGB, 16 bits become 8, transparency
  lies on white, and the EXIF rotation is applied. ICC profiles are not.

  Args:
    path: an image file of any format PIL reads; of several frames, the first.

  Returns:
    uint8 RGB [H, W, 3].

  Raises:
    UserError: if the file is missing, truncated or no image, or if there is no
      telling which picture is meant: floats, 32 bits, 12 bits in 16, channels
      that are neither color nor alpha, half transparent pixels all over, or
      several pages.
  """
  return open_picture(path).pixels


def open_picture(
  path: str | os.PathLike[str], data: bytes | None = None
) -> Picture:
  """Reads an image as `read_image` does, and keeps its bytes.

  Args:
    path: an image file.
    data: its contents, if they are at hand.

  Raises:
    UserError: as `read_image`.
  """
  data = _read_bytes(path) if data is None else data
  with _opened(data, path) as image:
    _refuse_pages(image, path)
    _refuse_extra_samples(image, path)
    raw, form = _raw_mode(image), image.format
    white_is_zero = form == 'TIFF' and image.tag_v2.get(262) == 0
    orientation = _load(image)
    with contextlib.suppress(*_BROKEN):  # broken EXIF hides no picture
      image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':
      gray = _deep_gray(image, raw, form, path)
      gray = 255 - gray if white_is_zero else gray
      pixels = np.repeat(gray[..., None], 3, axis=-1)
    else:
      pixels = _to_rgb(image, path)
      if ';16' in raw and form in ('PNG', 'TIFF'):
        _refuse_dark(pixels, data, path)
  return Picture(pixels, orientation, data)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
  """Returns the (height, width) that the file's head gives `read_image`.

  Raises:
    UserError: if the file is missing or no image.
  """
  with _opened(_read_bytes(path), path) as image:
    width, height = image.size
    turned = False
    with contextlib.suppress(*_BROKEN):
      turned = image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
  return (width, height) if turned else (height, width)


def read_label(
  path: str | os.PathLike[str], data: bytes | None = None
) -> np.ndarray:
  """Reads a palette or gray PNG as class indices, uint8 [H, W].

  Args:
    path: an image file whose palette indices or gray values are the labels.
    data: its contents, if they are at hand.

  Raises:
    UserError: as `open_label`, or if it holds colors.
  """
  return open_label(path, data).indices()


def open_label(
  path: str | os.PathLike[str], data: bytes | None = None
) -> LabelFile:
  """Reads a label file of a lossless format, with all bits as stored.

  Args:
    path: an image file of gray values, palette indices or colors.
    data: its contents, if they are at hand.

  Raises:
    UserError: if the file is missing, truncated, no image, of a lossy format,
      of several pages, of a mode that is no label or holds a value above 255.
  """
  data = _read_bytes(path) if data is None else data
  with _opened(data, path) as image:
    _refuse_lossy(image, path)
    if getattr(image, 'n_frames', 1) > 1:
      raise errors.UserError(
        f'{path}: a label of {image.n_frames} frames or pages; store the one '
        'that belongs to the image, alone'
      )
    _refuse_extra_samples(image, path)
    mode, raw, form = image.mode, _raw_mode(image), image.format
    _refuse_scaled(image, path)
    orientation = _load(image)
    palette = image.getpalette('RGB') if mode == 'P' else None
    pixels = _label_pixels(image, raw, path)
  if form != 'TIFF':  # which Pillow turns while it loads
    pixels = turn(pixels, orientation)
  if palette is not None:
    palette = np.array(palette, np.uint8).reshape(-1, 3)
    if form == 'GIF':
      _refuse_renumbered(pixels, palette, path)
  return LabelFile(path, pixels, palette, turned=orientation != 1)


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
  """Shows an array [H, W, ...] upright that has an EXIF orientation, 1 to 8."""
  if orientation in _QUARTER_TURNS:
    array = array.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    array = array[:, ::-1]
  if orientation in (3, 4, 7, 8):
    array = array[::-1]
  return np.ascontiguousarray(array)


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
  with _opened(_read_bytes(path), path) as image:
    palette = image.getpalette('RGB') if image.mode == 'P' else None
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
  """Returns `storable` of an image file, and its height and width.

  Args:
    path: an image file.
    data: its contents, if they are at hand.

  Raises:
    UserError: as `read_image`.
  """
  picture = open_picture(path, data)
  return storable(picture), picture.pixels.shape[:2]


def storable(picture: Picture) -> bytes:
  """Returns bytes that `decode_image` turns into the picture's pixels.

  The file's own bytes if they are a JPEG or PNG that does, else a PNG.
  """
  data, image = picture.data, picture.pixels
  if data.startswith((b'\xff\xd8', b'\x89PNG')):
    # Decoders may round differently by one; IMREAD_COLOR drops transparency
    # and knows no white page, which shows as a larger difference.
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if decoded is not None and decoded.shape == image.shape:
      difference = cv2.absdiff(decoded, image)
      if difference.max(initial=0) <= 1:
        return data
  return encode_image(image)


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
      raise errors.UserError(
        f'{text}: no such file or folder{disk.near_file(path)}'
      )
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
  return errors.UnreadableError(
    f'{path}: unreadable image ({reason}); replace the file or take it out'
  )


@contextlib.contextmanager
def _opened(data: bytes, path: str | os.PathLike[str]) -> Iterator[Image.Image]:
  """Opens any image format with PIL; `path` is for the errors alone."""
  try:
    with _any_size(), Image.open(io.BytesIO(data)) as image:
      width, height = image.size
      if width * height > _MOST_PIXELS or max(image.size) > _LONGEST_SIDE:
        raise errors.UserError(
          f'{path}: {width}x{height} is too large, at most {_MOST_PIXELS:,} '
          f'pixels and {_LONGEST_SIDE:,} a side are read; cut it into tiles'
        )
      yield image
  except errors.UserError:
    raise
  except Image.UnidentifiedImageError as error:
    if not data:
      raise errors.UnreadableError(
        f'{path}: the file is empty; replace it or take it out'
      ) from error
    _refuse_samples(data, path)
    raise errors.UnreadableError(
      f'{path}: unreadable image ({_unknown_format(data)}); replace the file '
      f'or take it out; formats that are read: {" ".join(IMAGE_SUFFIXES)}'
    ) from error
  except _BROKEN as error:
    raise _unreadable(path, error) from error


class _AnySize:
  """Lifts Pillow's limit of pixels, which all threads share."""

  def __init__(self) -> None:
    self._lock, self._inside, self._limit = threading.Lock(), 0, None

  @contextlib.contextmanager
  def __call__(self) -> Iterator[None]:
    """Lifts it while any thread is inside."""
    with self._lock:
      self._inside += 1
      if self._inside == 1:
        self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
      yield
    finally:
      with self._lock:
        self._inside -= 1
        if not self._inside:
          Image.MAX_IMAGE_PIXELS = self._limit


_any_size = _AnySize()


def _unknown_format(data: bytes) -> str:
  """Says why PIL opens no image in `data`, by the plugin that should."""
  if data[4:8] == b'ftyp' and data[8:11] in (b'hei', b'hev', b'mif'):
    return 'HEIC, which is not read'
  for name, (factory, accept) in list(Image.OPEN.items()):
    try:
      verdict = accept(data[:16]) if accept else False
      if isinstance(verdict, str):
        return verdict
      if verdict:
        factory(io.BytesIO(data), '')
    except Exception as error:  # readers of damaged files raise anything
      kind = _tiff_kind(data) if name == 'TIFF' else ''
      return f'{name}: {" ".join(str(error).split())}{kind}'
  return 'no image format that is known'


def _refuse_samples(data: bytes, path: str | os.PathLike[str]) -> None:
  """Refuses a whole TIFF of samples that PIL does not know, by its kind."""
  kind = _tiff_kind(data).removeprefix(', ')
  values = None
  if kind:
    with contextlib.suppress(cv2.error):
      values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  if values is not None:
    raise errors.UserError(
      f'{path}: {kind}, from {np.nanmin(values):.6g} to'
      f' {np.nanmax(values):.6g}; gray and RGB of 8 or 16 bits are read: store'
      ' 8 bits, 0 to 255'
    )


def _tiff_kind(data: bytes) -> str:
  """Names the samples of a TIFF, as ', 5 samples of 16 bits a pixel'."""
  with contextlib.suppress(Exception):  # it may be damaged anywhere
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    kind = {1: '', 2: 'signed ', 3: 'float '}[tags.get(339, (1,))[0]]
    samples = f'{tags.get(277, 1)} {kind}samples'
    return f', {samples} of {tags.get(258, (1,))[0]} bits a pixel'
  return ''


def _raw_mode(image: Image.Image) -> str:
  """PIL's name of how the pixels lie in the file; '' once they are loaded."""
  for tile in image.tile[:1]:
    args = tile[3]
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ''
  return ''


def _load(image: Image.Image) -> int:
  """Loads the pixels; returns the EXIF orientation that the file asks for."""
  # Pillow turns a TIFF while it loads, and forgets the tag.
  found = image.tag_v2.get(_ORIENTATION) if image.format == 'TIFF' else None
  image.load()
  with contextlib.suppress(*_BROKEN):
    found = found or image.getexif().get(_ORIENTATION)
  return found if found in range(1, 9) else 1


def _refuse_pages(image: Image.Image, path: str | os.PathLike[str]) -> None:
  """Refuses a TIFF whose second page is as large: which one is the image?"""
  if image.format != 'TIFF' or image.n_frames == 1:
    return
  size, count = image.size, image.n_frames
  image.seek(1)
  # Bits of the tag: a smaller version, or a mask.
  other = image.size != size or image.tag_v2.get(254, 0) & 5
  image.seek(0)
  if not other:
    raise errors.UserError(
      f'{path}: {count} pages of {size[0]}x{size[1]}; store one RGB or gray '
      'image alone'
    )


def _refuse_extra_samples(
  image: Image.Image, path: str | os.PathLike[str]
) -> None:
  """Refuses a TIFF with channels that are neither color nor alpha."""
  if image.format != 'TIFF':
    return
  tags = image.tag_v2
  # Many writers leave out the tag that calls a fourth channel alpha.
  samples, extra = tags.get(277, 1), tags.get(338, (2,))
  colors = _TIFF_COLORS.get(tags.get(262), 1)
  alpha = int(any(kind in (1, 2, 999) for kind in extra))
  if samples > colors + alpha:
    raise errors.UserError(
      f'{path}: {samples} channels, {samples - colors - alpha} of them neither '
      'color nor alpha; store the three that make the picture as RGB'
    )


def _refuse_lossy(image: Image.Image, path: str | os.PathLike[str]) -> None:
  form, compression = image.format, image.info.get('compression')
  if form == 'TIFF' and compression in _LOSSY_TIFF:
    form = f'TIFF with {compression.removeprefix("tiff_").upper()} compression'
  elif form in _LOSSLESS:
    return
  raise errors.UserError(
    f'{path}: a label must be lossless, this is a {form}, which may change '
    'values; export it as PNG again from where it was drawn'
  )


def _refuse_scaled(image: Image.Image, path: str | os.PathLike[str]) -> None:
  """Refuses a PGM of another maximum than 255, which PIL scales to it."""
  args = image.tile[0][3] if image.tile else ''
  scaled = isinstance(args, tuple) and args[-1] != 255
  if image.format == 'PPM' and image.mode != 'F' and scaled:
    raise errors.UserError(
      f'{path}: the largest gray value that its header names is {args[-1]}, '
      'so values are shares of it and no indices; write 255 there, or a PNG'
    )


def _refuse_renumbered(
  pixels: np.ndarray, palette: np.ndarray, path: str | os.PathLike[str]
) -> None:
  """Refuses a gray GIF, whose writers number the gray values in use anew."""
  used = np.unique(pixels)
  used = used[used < len(palette)]
  gray = palette[used]
  if (gray == gray[:, :1]).all() and (gray[:, 0] != used).any():
    raise errors.UserError(
      f'{path}: a GIF of gray values stored as other indices, so nothing says '
      'which of them are the classes; store a gray PNG'
    )


def _label_pixels(
  image: Image.Image, raw: str, path: str | os.PathLike[str]
) -> np.ndarray:
  """Returns a loaded label's indices uint8 [H, W] or colors [H, W, 3]."""
  mode, pixels = image.mode, np.array(image)
  if mode in ('LA', 'RGBA') and (pixels[..., -1] == 255).all():
    mode = mode[:-1]
    pixels = pixels[..., 0] if mode == 'L' else pixels[..., :3]
  elif mode in ('LA', 'RGBA'):
    raise errors.UserError(
      f'{path}: a label of mode {mode} with transparent pixels; store it '
      'without alpha'
    )
  if mode not in ('P', 'L', '1', 'RGB') and not mode.startswith('I'):
    raise errors.UserError(
      f'{path}: a label must be a palette or gray PNG of class indices, but '
      f'its mode is {mode}; store class indices'
    )
  if pixels.size and (pixels.max() > 255 or pixels.min() < 0):
    value = pixels.max() if pixels.max() > 255 else pixels.min()
    raise errors.UserError(
      f'{path}: label value {value} is not in 0..255; store class indices'
    )
  scale = _GRAY_SCALE.get(raw[:3], 1) if mode == 'L' else 1
  return pixels.astype(np.uint8) // np.uint8(scale)


def _deep_gray(
  image: Image.Image, raw: str, form: str, path: str | os.PathLike[str]
) -> np.ndarray:
  """Returns gray of more than 8 bits, a loaded picture, as uint8 [H, W]."""
  values = np.array(image)
  scaled = form == 'PPM' and image.mode != 'F'
  if not image.mode.startswith('I;16') and not scaled:
    kind = 'float' if image.mode == 'F' else '32-bit or signed'
    raise errors.UserError(
      f'{path}: {kind} pixels (mode {image.mode}) from {np.nanmin(values):.6g} '
      f'to {np.nanmax(values):.6g}, where nothing says what is black and what '
      'is white; store 8 bits, 0 to 255'
    )
  if raw == 'I;12':
    return (values >> 4).astype(np.uint8)
  # A PPM says how many bits it has, and PIL scales them.
  if not scaled and 0 < values.max(initial=0) < _DARK:
    raise _too_dark(path, values.max())
  gray = (values >> 8).astype(np.uint8)
  clear = image.info.get('transparency')
  if isinstance(clear, int):
    gray[values == clear] = 255
  return gray


def _refuse_dark(
  pixels: np.ndarray, data: bytes, path: str | os.PathLike[str]
) -> None:
  """Refuses 16 bits a channel of which the upper two are not used."""
  if pixels.max(initial=0) >= _DARK >> 8:
    return
  deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  top = _DARK - 1 if deep is None else int(deep[..., :3].max(initial=0))
  if top:
    raise _too_dark(path, top)


def _too_dark(path: str | os.PathLike[str], top: int) -> errors.UserError:
  return errors.UserError(
    f'{path}: 16 bits a channel, but no value above {top}, so it probably '
    'holds 14 bits or fewer; store 8 bits, or use the whole range of 16'
  )


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
  """Returns a loaded picture of 8 bits a channel as uint8 RGB [H, W, 3]."""
  if image.mode in ('LA', 'PA', 'La', 'RGBA', 'RGBa') or (
    'transparency' in image.info
  ):
    if image.mode == 'La':
      image = image.convert('LA')
    image = image.convert('RGBA')
    _refuse_half_transparent(np.array(image.getchannel('A')), path)
    page = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(page, image)
  return np.array(image.convert('RGB'))


def _refuse_half_transparent(
  alpha: np.ndarray, path: str | os.PathLike[str]
) -> None:
  share = np.count_nonzero((alpha > 0) & (alpha < 255)) / max(alpha.size, 1)
  if share <= _HALF_TRANSPARENT and alpha.any():
    return
  kind = (
    f'{share:.0%} of its pixels are half' if alpha.any() else 'all of it is'
  )
  raise errors.UserError(
    f'{path}: {kind} transparent, so nothing says which picture is meant; '
    'store it without alpha'
  )
