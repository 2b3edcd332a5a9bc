import concurrent.futures
import io
import itertools
import os
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_writers import gradient, gray_png, sparse, tiff
from PIL import Image, ImageOps, features

from deeplab_jax.data import image_files, images, label_files
from deeplab_jax.runtime import errors

EPS = (
  b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
)


def test_rgb_png_reads_exactly(tmp_path):
  Image.fromarray(gradient()).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(
    images.read_image(tmp_path / 'a.png'), gradient()
  )


def test_gray_image_gets_three_equal_channels(tmp_path):
  gray = gradient()[..., 0]
  Image.fromarray(gray).save(tmp_path / 'a.png')
  image = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(image, np.stack([gray] * 3, -1))


def test_a_pil_image_of_16_bits_looks_as_its_file_does(tmp_path):
  deep = Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257)
  deep.save(tmp_path / 'a.png')
  expected = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(images.as_pixels(deep), expected)
  with pytest.raises(errors.UserError, match='float pixels'):
    images.as_pixels(deep.convert('F'))


def test_cmyk_jpeg_shows_its_ink_colours(tmp_path):
  cyan = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
  cyan.save(tmp_path / 'a.jpg', quality=95)
  image = images.read_image(tmp_path / 'a.jpg')
  assert np.abs(image.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
  values = np.array([[0, 256, 32768, 65535]], np.uint16)
  path = tmp_path / f'a.{suffix}'
  cv2.imwrite(str(path), values)
  image = images.read_image(path)
  assert image[0, :, 1].tolist() == [0, 1, 128, 255]


def test_16_bit_rgb_png_is_scaled(tmp_path):
  values = np.full((4, 4, 3), (65535, 32768, 0), np.uint16)  # OpenCV: B, G, R
  cv2.imwrite(str(tmp_path / 'a.png'), values)
  image = images.read_image(tmp_path / 'a.png')
  assert image[0, 0].tolist() == [0, 128, 255]


def test_transparency_lies_on_white(tmp_path):
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[:, :2] = (255, 0, 0, 255)
  rgba[:, 2:] = (0, 0, 255, 0)
  Image.fromarray(rgba).save(tmp_path / 'a.png')
  image = images.read_image(tmp_path / 'a.png')
  assert image[0, 0].tolist() == [255, 0, 0]
  assert image[0, 3].tolist() == [255, 255, 255]


def test_transparent_palette_and_gray_lie_on_white(tmp_path):
  indexed = Image.fromarray(np.array([[0, 1]], np.uint8), 'P')
  indexed.putpalette([9, 9, 9, 0, 200, 0])
  indexed.save(tmp_path / 'p.png', transparency=0)
  image = images.read_image(tmp_path / 'p.png')
  assert image.tolist() == [[[255] * 3, [0, 200, 0]]]
  gray = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), 'LA')
  gray.save(tmp_path / 'la.png')
  image = images.read_image(tmp_path / 'la.png')
  assert image.tolist() == [[[0] * 3, [255] * 3]]


def test_exif_rotation_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the viewer turns the picture a quarter clockwise
  Image.fromarray(gradient(16, 32)).save(
    tmp_path / 'a.png', exif=exif.tobytes()
  )
  image = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(image, np.rot90(gradient(16, 32), -1))


def test_broken_exif_hides_no_picture(tmp_path):
  Image.fromarray(gradient()).save(
    tmp_path / 'a.jpg', exif=b'Exif\0\0' + b'\xff' * 30
  )
  assert images.read_image(tmp_path / 'a.jpg').shape == (20, 30, 3)


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_truncated_file_is_named(tmp_path, suffix):
  rng = np.random.default_rng(0)
  path = tmp_path / f'half.{suffix}'
  Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(errors.UserError, match=rf'half\.{suffix}: unreadable'):
    images.read_image(path)


@pytest.mark.parametrize('data', [b'', b'no image', b'\x89PNG\r\n\x1a\n12'])
def test_what_is_no_image_is_named_in_one_line(tmp_path, data):
  (tmp_path / 'a.png').write_bytes(data)
  for read in (images.read_image, label_files.open_label):
    with pytest.raises(errors.UserError, match=r'a\.png') as caught:
      read(tmp_path / 'a.png')
    assert '\n' not in str(caught.value)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r'gone\.png: no such file'):
    images.read_image(tmp_path / 'gone.png')


def _odd_files(root):
  rgb = Image.fromarray(gradient())
  exif = Image.Exif()
  exif[0x0112] = 3
  rgba = rgb.copy()
  rgba.putalpha(Image.fromarray(gradient()[..., 0] // 128 * 255))
  for name, image, options in [
    ('rgb.jpg', rgb, {}),
    ('gray.jpg', rgb.convert('L'), {}),
    ('cmyk.jpg', rgb.convert('CMYK'), {}),
    ('turned.jpg', rgb, {'exif': exif.tobytes()}),
    ('progressive.jpg', rgb, {'progressive': True, 'subsampling': 0}),
    ('rgb.png', rgb, {}),
    ('alpha.png', rgba, {}),
    ('palette.png', rgb.quantize(16), {}),
    ('palette_clear.png', rgb.quantize(16), {'transparency': 3}),
    ('clear.png', rgb, {'transparency': (0, 0, 255)}),
    ('bits.png', rgb.convert('1'), {}),
    ('plain.bmp', rgb, {}),
  ]:
    image.save(root / name, **options)
    yield root / name
  deep = 65 * np.arange(999, dtype=np.uint16)[None]
  cv2.imwrite(str(root / 'deep.png'), deep)
  yield root / 'deep.png'


def test_stored_bytes_decode_to_what_a_viewer_shows(tmp_path):
  kept = set()
  for path in _odd_files(tmp_path):
    data = images.open_picture(path).storable()
    expected = images.read_image(path)
    decoded = images.decode_image(data)
    assert decoded.shape == expected.shape, path
    np.testing.assert_allclose(
      decoded.astype(int), expected.astype(int), atol=1, err_msg=str(path)
    )
    if data == path.read_bytes():
      kept.add(path.name)
  assert {'rgb.jpg', 'gray.jpg', 'rgb.png'} <= kept
  assert not kept & {'alpha.png', 'palette_clear.png', 'plain.bmp'}


def test_labels_survive_encoding():
  label = np.arange(256, dtype=np.uint8).reshape(8, 32)
  data = images.encode_label(label)
  np.testing.assert_array_equal(images.decode_label(data), label)
  assert Image.open(io.BytesIO(data)).mode == 'L'


@pytest.mark.parametrize('data', [b'', b'junk'])
def test_decoders_refuse_junk(data):
  for decode in (images.decode_image, images.decode_label):
    with pytest.raises(ValueError, match=f'{len(data)} bytes'):
      decode(data)


def _touch(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.touch()
  return path


def test_images_are_listed_from_files_folders_and_globs(tmp_path):
  first = _touch(tmp_path / 'in' / 'b.JPG')
  second = _touch(tmp_path / 'in' / 'deep' / 'a.png')
  other = _touch(tmp_path / 'noname')
  _touch(tmp_path / 'in' / 'notes.txt')
  _touch(tmp_path / 'in' / '._b.jpg')
  folder = str(tmp_path / 'in')
  assert images.list_images([folder]) == [first, second]
  assert images.list_images([f'{folder}/**/*']) == [first, second]
  assert images.list_images([f'{folder}/*.JPG']) == [first]
  assert images.list_images([str(other), folder, str(first)]) == [
    other,
    first,
    second,
  ]


def test_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
  path = _touch(tmp_path / 'a[1].png')
  assert images.list_images([str(path)]) == [path]


def test_input_without_images_is_named(tmp_path):
  with pytest.raises(errors.UserError, match='gone: no such'):
    images.list_images([str(tmp_path / 'gone')])
  with pytest.raises(errors.UserError, match='no image found'):
    images.list_images([str(tmp_path)])
  with pytest.raises(errors.UserError, match=r'\*\.png: no image found'):
    images.list_images([str(tmp_path / '*.png')])
  with pytest.raises(errors.UserError, match='no image given'):
    images.list_images([])


def _read_refused(path):
  """The one line that says why a file is refused, though it is not damaged."""
  with pytest.raises(errors.UserError) as caught:
    images.read_image(path)
  assert not isinstance(caught.value, errors.UnreadableError)
  assert '\n' not in str(caught.value)
  assert str(caught.value).startswith(str(path))
  return str(caught.value)


@pytest.mark.parametrize(
  'array, words',
  [
    (np.float32([[0.25, 0.5]]), 'float pixels (mode F) from 0.25 to 0.5'),
    (np.float32([[0, 255]]), 'float pixels (mode F) from 0 to 255'),
    (np.int32([[-3, 70000]]), '32-bit or signed pixels (mode I) from -3 to 70'),
  ],
)
def test_pixels_without_black_and_white_are_refused(tmp_path, array, words):
  Image.fromarray(array).save(tmp_path / 'a.tif')
  assert words in _read_refused(tmp_path / 'a.tif')


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('bits', [12, 14])
def test_fewer_bits_in_16_are_refused_by_their_largest_value(
  tmp_path, suffix, channels, bits
):
  largest = 2**bits - 1
  values = np.full((4, 5, channels), largest, np.uint16)
  if channels == 4:
    values[..., 3] = 65535
  path = tmp_path / f'a.{suffix}'
  cv2.imwrite(str(path), values)
  message = _read_refused(path)
  assert f'no value above {largest}' in message and '14 bits' in message
  values[0, 0, :3] = 2**14
  cv2.imwrite(str(path), values)
  assert images.read_image(path)[0, 0].tolist() == [64, 64, 64]
  values[..., :3] = 0
  cv2.imwrite(str(path), values)
  assert not images.read_image(path).any()  # black is black


def test_tiff_that_says_12_bits_is_scaled_to_8(tmp_path):
  values = np.array([[0, 16, 2048, 4095]], np.uint16)
  (tmp_path / 'a.tif').write_bytes(tiff(values, 12))
  image = images.read_image(tmp_path / 'a.tif')
  assert image[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_tiff_whose_zero_is_white_is_inverted(tmp_path):
  values = np.array([[0, 65535, 32768]], np.uint16)
  (tmp_path / 'a.tif').write_bytes(tiff(values, 16, (262, 3, 0)))
  image = images.read_image(tmp_path / 'a.tif')
  assert image[0, :, 0].tolist() == [255, 0, 127]


@pytest.mark.parametrize(
  'extra, refused', [(0, True), (None, False), (2, False)]
)
def test_fourth_channel_must_be_alpha(tmp_path, extra, refused):
  values = np.full((2, 3, 4), (10, 20, 30, 255), np.uint8)
  tags = [(262, 3, 2)] + ([] if extra is None else [(338, 3, extra)])
  path = tmp_path / 'a.tif'
  path.write_bytes(tiff(values, 8, *tags))
  if refused:
    message = _read_refused(path)
    assert '4 channels, 1 of them neither color nor alpha' in message
  else:
    assert images.read_image(path)[0, 0].tolist() == [10, 20, 30]


def test_tiff_that_cannot_be_opened_names_its_samples(tmp_path):
  values = np.zeros((2, 3, 7), np.uint16)
  (tmp_path / 'a.tif').write_bytes(tiff(values, 16))
  with pytest.raises(errors.UnreadableError) as caught:
    images.read_image(tmp_path / 'a.tif')
  message = str(caught.value)
  assert '(TIFF: ' in message and ', 7 samples of 16 bits a pixel)' in message
  assert '.jpg' in message and '.tif' in message


def test_iphone_format_is_named(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(b'\0\0\0\x18ftypheic' + bytes(99))
  with pytest.raises(errors.UnreadableError, match=r'a\.jpg.*\(HEIC'):
    images.read_image(tmp_path / 'a.jpg')


def test_two_pages_of_one_size_are_refused_but_a_thumbnail_is_not(tmp_path):
  page, path = Image.fromarray(gradient()), tmp_path / 'a.tif'
  page.save(path, save_all=True, append_images=[page, page])
  assert '3 pages of 30x20' in _read_refused(path)
  page.save(path, save_all=True, append_images=[page.resize((3, 2))])
  np.testing.assert_array_equal(images.read_image(path), gradient())


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_half_transparent_picture_is_refused_but_smooth_edges_are_not(
  tmp_path, mode
):
  path = tmp_path / 'a.png'

  def save(alpha):
    if mode == 'P':
      image = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8), (5, 1)))
      image.putpalette([9, 9, 9] * 20)
      image.save(path, transparency=bytes(alpha.tolist()))
    else:
      image = np.full((5, 20, len(mode)), 9, np.uint8)
      image[..., -1] = alpha
      Image.fromarray(image, mode).save(path)

  alpha = np.full(20, 255, np.uint8)
  alpha[0], alpha[1] = 0, 128  # 5 % are half transparent
  save(alpha)
  image = images.read_image(path)
  assert image[0, :3, 0].tolist() == [255, 132, 9]
  alpha[2:4] = 254  # 15 %
  save(alpha)
  assert '15% of its pixels are half transparent' in _read_refused(path)
  save(np.zeros(20, np.uint8))
  assert 'all of it is transparent' in _read_refused(path)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turn_is_what_pillow_does_with_the_tag(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  buffer = io.BytesIO()
  Image.fromarray(gradient()).save(buffer, 'PNG', exif=exif)
  expected = np.array(ImageOps.exif_transpose(Image.open(buffer)))
  turned = image_files.turn(gradient(), orientation)
  np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif'])
def test_orientation_is_applied_once_and_told(tmp_path, suffix):
  exif = Image.Exif()
  exif[0x0112] = 6
  path = tmp_path / f'a.{suffix}'
  Image.fromarray(gradient()).save(path, exif=exif)
  picture = images.open_picture(path)
  assert picture.orientation == 6 and picture.pixels.shape == (30, 20, 3)
  difference = picture.pixels.astype(int) - np.rot90(gradient(), -1)
  assert np.abs(difference).mean() < 4


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif', 'bmp'])
def test_size_by_the_head_is_that_of_the_picture(tmp_path, suffix, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / f'a.{suffix}'
  options = {} if suffix == 'bmp' else {'exif': exif}
  Image.fromarray(gradient()).save(path, **options)
  assert images.read_size(path) == images.read_image(path).shape[:2]
  if suffix in ('png', 'jpg'):  # the pixels may be cut off
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(errors.UnreadableError):
      images.read_image(path)
    assert images.read_size(path) == ((30, 20) if orientation > 4 else (20, 30))


def test_pillows_limit_of_pixels_does_not_hold_and_stays_for_others(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
  Image.fromarray(gradient()).save(tmp_path / 'a.png')
  with pytest.raises(Image.DecompressionBombError):
    Image.open(tmp_path / 'a.png')
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    paths = [tmp_path / 'a.png'] * 40
    for image in threads.map(images.read_image, paths):
      np.testing.assert_array_equal(image, gradient())
  assert Image.MAX_IMAGE_PIXELS == 100


def test_more_pixels_than_opencv_decodes_are_refused_before_reading(tmp_path):
  path = tmp_path / 'a.png'
  data = gray_png(np.zeros((1, 1), np.uint8), 8)
  size = struct.pack('>II', 40_000, 30_000)
  header = b'IHDR' + size + data[24:29]
  check = struct.pack('>I', zlib.crc32(header))
  path.write_bytes(data[:12] + header + check + data[33:])
  assert '40000x30000 is too large' in _read_refused(path)


@pytest.mark.parametrize('suffix', images.IMAGE_SUFFIXES)
def test_every_suffix_that_is_listed_is_read(tmp_path, suffix):
  form = Image.registered_extensions()[suffix]
  form = 'JPEG' if form == 'MPO' else form
  path = tmp_path / f'a{suffix}'
  gray = suffix in ('.pgm', '.pbm')
  image = Image.new('L' if gray else 'RGB', (16, 16), 'red' if not gray else 76)
  image.save(path, form)
  color = images.read_image(path)[8, 8].astype(int)
  assert np.abs(color - ([76] * 3 if gray else [255, 0, 0])).max() < 4
  assert images.list_images([str(tmp_path)]) == [path]


@pytest.mark.parametrize(
  'dtype, kind',
  [
    (np.float32, '3 float samples of 32 bits'),
    (np.float64, '3 float samples of 64 bits'),
    (np.int32, '3 signed samples of 32 bits'),
  ],
)
def test_color_tiff_of_other_numbers_is_refused_with_kind_and_range(
  tmp_path, dtype, kind
):
  values = np.full((8, 9, 3), 1, dtype)
  values[0, 0] = 0
  # OpenCV 4.12 would store the logarithm of floats in 16 bits.
  plain = [cv2.IMWRITE_TIFF_COMPRESSION, 1]
  cv2.imwrite(str(tmp_path / 'a.tif'), values, plain)
  message = _read_refused(tmp_path / 'a.tif')
  assert f'{kind} a pixel, from 0 to 1; ' in message
  assert 'unreadable' not in message and 'store 8 bits' in message


def test_floats_in_a_portable_map_are_refused(tmp_path):
  data = b'Pf\n2 1\n-1.0\n' + np.float32([0.5, 0.25]).tobytes()
  (tmp_path / 'a.pfm').write_bytes(data)
  assert 'float pixels' in _read_refused(tmp_path / 'a.pfm')


def test_an_empty_file_is_called_empty(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'')
  with pytest.raises(
    errors.UnreadableError, match=r'a\.png: the file is empty'
  ):
    images.read_image(tmp_path / 'a.png')


def test_jpeg_2000_is_read_where_pillow_reads_it():
  assert features.check('jpg_2000') == ('.jp2' in images.IMAGE_SUFFIXES)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (os.mkfifo, 'not a regular file'),
    (lambda path: path.symlink_to('/dev/zero'), 'not a regular file'),
    (lambda path: path.symlink_to('/dev/stdin'), 'not a regular file'),
    (lambda path: path.symlink_to(path), 'Too many levels'),
    (Path.mkdir, 'not a regular file'),
    (Path.touch, 'the file is empty'),
    (lambda path: sparse(path, 2**40), 'too many'),
    (lambda path: sparse(path, 2**32), 'unknown'),
    (lambda path: path.write_bytes(EPS), 'EPS is not read'),
  ],
  ids=itertools.count(),
)
@pytest.mark.parametrize(
  'read', [images.read_image, images.read_size, label_files.open_label]
)
def test_what_is_no_image_file_is_refused_at_once(tmp_path, make, words, read):
  path = tmp_path / 'a.png'
  make(path)
  start = time.monotonic()
  with pytest.raises(errors.UserError, match=words) as caught:
    read(path)
  assert time.monotonic() - start < 5
  assert str(caught.value).startswith(f'{path}: ')
  assert '\n' not in str(caught.value)


def test_an_image_may_not_take_half_of_the_memory(tmp_path, monkeypatch):
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert min(2**30, memory // 32) == image_files._MOST_PIXELS
  monkeypatch.setattr(image_files, '_MOST_PIXELS', 99)
  path = tmp_path / 'a.tif'
  Image.new('L', (10, 10)).save(path)
  message = _read_refused(path)
  assert '10x10 is too large, at most 99 pixels' in message
  assert 'as config.data.tile=SIDE does for a data set' in message
  # which lets it through, as long as memory holds it
  assert images.open_picture(path, to_cut=True).pixels.shape == (10, 10, 3)
  monkeypatch.setattr(image_files, '_MOST_TO_CUT', 99)
  with pytest.raises(errors.UserError, match='at most 99 pixels'):
    images.open_picture(path, to_cut=True)
