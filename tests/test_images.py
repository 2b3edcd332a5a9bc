import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax import errors
from deeplab_jax.data import images


def _gradient(height=20, width=30):
  y, x = np.mgrid[:height, :width]
  return np.stack([x * 8, y * 12, 255 - x * 8], -1).astype(np.uint8)


def test_rgb_png_reads_exactly(tmp_path):
  Image.fromarray(_gradient()).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(
    images.read_image(tmp_path / 'a.png'), _gradient()
  )


def test_gray_image_gets_three_equal_channels(tmp_path):
  gray = _gradient()[..., 0]
  Image.fromarray(gray).save(tmp_path / 'a.png')
  image = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(image, np.stack([gray] * 3, -1))


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
  Image.fromarray(_gradient(16, 32)).save(
    tmp_path / 'a.png', exif=exif.tobytes()
  )
  image = images.read_image(tmp_path / 'a.png')
  np.testing.assert_array_equal(image, np.rot90(_gradient(16, 32), -1))


def test_broken_exif_hides_no_picture(tmp_path):
  Image.fromarray(_gradient()).save(
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
  for read in (images.read_image, images.read_label):
    with pytest.raises(errors.UserError, match=r'a\.png') as caught:
      read(tmp_path / 'a.png')
    assert '\n' not in str(caught.value)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(errors.UserError, match=r'gone\.png: no such file'):
    images.read_image(tmp_path / 'gone.png')


def test_palette_label_reads_as_indices_not_colours(tmp_path):
  label = np.array([[0, 1], [20, 255]], np.uint8)
  indexed = Image.fromarray(label, 'P')
  indexed.putpalette(list(range(256)) * 3)
  indexed.save(tmp_path / 'a.png')
  np.testing.assert_array_equal(images.read_label(tmp_path / 'a.png'), label)
  # the trap that this guards against
  assert cv2.imread(str(tmp_path / 'a.png'), -1).ndim == 3


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_gray_label_of_few_bits_reads_as_stored(tmp_path, bits):
  label = (np.arange(16) % 2**bits).astype(np.uint8).reshape(2, 8)
  flags = [cv2.IMWRITE_PNG_BILEVEL, 1] if bits == 1 else []
  path = tmp_path / 'a.png'
  if bits in (1, 8):
    cv2.imwrite(str(path), label, flags)
  else:
    path.write_bytes(_gray_png(label, bits))
  np.testing.assert_array_equal(images.read_label(path), label)


def _gray_png(label, bits):
  """A gray PNG of 2 or 4 bits, which no library at hand writes."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

  height, width = label.shape
  spread = np.unpackbits(label[..., None], axis=-1)[..., 8 - bits :]
  rows = np.packbits(spread.reshape(height, -1), axis=-1)
  raw = b''.join(b'\0' + row.tobytes() for row in rows)
  header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(raw))
    + chunk(b'IEND', b'')
  )


def test_label_of_colours_is_refused(tmp_path):
  Image.fromarray(_gradient()).save(tmp_path / 'a.png')
  with pytest.raises(errors.UserError, match=r'a\.png.*class indices.*RGB'):
    images.read_label(tmp_path / 'a.png')


def test_16_bit_label_reads_and_a_large_value_is_named(tmp_path):
  cv2.imwrite(str(tmp_path / 'a.png'), np.array([[0, 7]], np.uint16))
  assert images.read_label(tmp_path / 'a.png').tolist() == [[0, 7]]
  cv2.imwrite(str(tmp_path / 'a.png'), np.array([[0, 700]], np.uint16))
  with pytest.raises(errors.UserError, match=r'a\.png.*700'):
    images.read_label(tmp_path / 'a.png')


def _odd_files(root):
  rgb = Image.fromarray(_gradient())
  exif = Image.Exif()
  exif[0x0112] = 3
  rgba = rgb.copy()
  rgba.putalpha(Image.fromarray(_gradient()[..., 0]))
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
  cv2.imwrite(str(root / 'deep.png'), np.arange(999, dtype=np.uint16)[None])
  yield root / 'deep.png'


def test_stored_bytes_decode_to_what_a_viewer_shows(tmp_path):
  kept = set()
  for path in _odd_files(tmp_path):
    data, size = images.storable_image(path)
    expected = images.read_image(path)
    decoded = images.decode_image(data)
    assert size == expected.shape[:2], path
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
