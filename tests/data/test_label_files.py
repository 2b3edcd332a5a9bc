"""Label files are read as stored, or refused by name."""

import cv2
import numpy as np
import pytest
from image_writers import gradient, gray_png, tiff
from PIL import Image

from deeplab_jax.data import label_files
from deeplab_jax.runtime import errors


def _read(path):
  return label_files.open_label(path).indices()


def _refused(path):
  """The one line that says why a file is refused, though it is not damaged."""
  with pytest.raises(errors.UserError) as caught:
    _read(path)
  assert not isinstance(caught.value, errors.UnreadableError)
  assert '\n' not in str(caught.value)
  assert str(caught.value).startswith(str(path))
  return str(caught.value)


def test_palette_label_reads_as_indices_not_colours(tmp_path):
  label = np.array([[0, 1], [20, 255]], np.uint8)
  indexed = Image.fromarray(label, 'P')
  indexed.putpalette(list(range(256)) * 3)
  indexed.save(tmp_path / 'a.png')
  np.testing.assert_array_equal(_read(tmp_path / 'a.png'), label)
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
    path.write_bytes(gray_png(label, bits))
  np.testing.assert_array_equal(_read(path), label)


def test_label_of_colours_is_refused(tmp_path):
  Image.fromarray(gradient()).save(tmp_path / 'a.png')
  with pytest.raises(errors.UserError, match=r'a\.png.*class indices.*RGB'):
    _read(tmp_path / 'a.png')


def test_16_bit_label_reads_and_a_large_value_is_named(tmp_path):
  cv2.imwrite(str(tmp_path / 'a.png'), np.array([[0, 7]], np.uint16))
  assert _read(tmp_path / 'a.png').tolist() == [[0, 7]]
  cv2.imwrite(str(tmp_path / 'a.png'), np.array([[0, 700]], np.uint16))
  with pytest.raises(errors.UserError, match=r'a\.png.*700'):
    _read(tmp_path / 'a.png')


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_label_with_an_orientation_of_its_own_is_turned(tmp_path, suffix):
  label = np.arange(6, dtype=np.uint8).reshape(2, 3)
  exif = Image.Exif()
  exif[0x0112] = 8
  path = tmp_path / f'a.{suffix}'
  Image.fromarray(label).save(path, exif=exif)
  file = label_files.open_label(path)
  assert file.turned
  np.testing.assert_array_equal(file.pixels, np.rot90(label))


@pytest.mark.parametrize(
  'form, options, words',
  [
    ('JPEG', {'quality': 100}, 'this is a JPEG'),
    ('WEBP', {'lossless': True}, 'this is a WEBP'),
    ('TIFF', {'compression': 'jpeg'}, 'this is a TIFF with JPEG compression'),
  ],
)
def test_lossy_label_is_refused_whatever_its_name(
  tmp_path, form, options, words
):
  path = tmp_path / 'a.png'
  Image.new('L', (16, 16), 2).save(path, form, **options)
  message = _refused(path)
  assert words in message and 'must be lossless' in message


@pytest.mark.parametrize(
  'form, options',
  [
    ('PNG', {}),
    ('TIFF', {}),
    ('TIFF', {'compression': 'tiff_lzw'}),
    ('BMP', {}),
    ('GIF', {'optimize': False}),
    ('PPM', {}),
    ('TGA', {}),
  ],
)
def test_lossless_labels_of_any_format_read_as_stored(tmp_path, form, options):
  label = (np.arange(48) % 7).astype(np.uint8).reshape(6, 8)
  label[0] = 255
  image = Image.fromarray(label)
  if form == 'GIF':  # of gray, Pillow numbers the values in use anew
    image.putpalette([index * 37 % 256 for index in range(768)])
  image.save(tmp_path / 'a', form, **options)
  np.testing.assert_array_equal(_read(tmp_path / 'a'), label)


def test_gif_that_numbers_gray_values_anew_is_refused(tmp_path):
  path = tmp_path / 'a.gif'
  Image.fromarray(np.array([[0, 5, 9]], np.uint8)).save(path)
  with Image.open(path) as image:
    assert np.array(image).tolist() == [[0, 1, 2]]  # the trap
  assert 'a GIF of gray values' in _refused(path)


@pytest.mark.parametrize('bits, compression', [(2, 1), (4, 1)])
def test_gray_tiff_of_few_bits_reads_as_stored(tmp_path, bits, compression):
  per_byte = 8 // bits
  label = (np.arange(16) % 2**bits).astype(np.uint8).reshape(2, 8)
  parts = label.reshape(2, -1, per_byte).astype(int)
  shifts = np.arange(per_byte)[::-1] * bits
  packed = (parts << shifts).sum(-1).astype(np.uint8)
  data = tiff(packed, bits, (256, 4, 8))
  (tmp_path / 'a.tif').write_bytes(data)
  np.testing.assert_array_equal(_read(tmp_path / 'a.tif'), label)


def test_label_of_several_frames_is_refused(tmp_path):
  frames = [Image.new('L', (4, 4), value) for value in (1, 2)]
  for suffix in ('tif', 'png', 'gif'):
    path = tmp_path / f'a.{suffix}'
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert '2 frames or pages' in _refused(path)


def test_pgm_label_of_another_maximum_is_refused_as_pillow_scales_it(tmp_path):
  path = tmp_path / 'a.pgm'
  path.write_bytes(b'P5 2 1 2\n\0\1')
  assert np.array(Image.open(path)).tolist() == [[0, 128]]  # the trap
  assert 'names is 2' in _refused(path)


def test_constant_alpha_of_a_label_is_dropped_and_other_refused(tmp_path):
  label = np.dstack([np.arange(4), [255] * 4]).astype(np.uint8)
  path = tmp_path / 'a.png'
  Image.fromarray(label, 'LA').save(path)
  assert _read(path).tolist() == [[0, 1, 2, 3]]
  label[..., 1] = 7  # constant, so it says nothing
  Image.fromarray(label, 'LA').save(path)
  assert _read(path).tolist() == [[0, 1, 2, 3]]
  label[0, 0, 1] = 0
  Image.fromarray(label, 'LA').save(path)
  assert 'transparent' in _refused(path)


def test_alpha_beside_colors_is_dropped_if_the_colors_tell_as_much(tmp_path):
  colors = [[0, 0, 0, 0], [9, 0, 0, 255], [0, 0, 9, 255], [0, 0, 0, 0]]
  path = tmp_path / 'a.png'
  Image.fromarray(np.uint8([colors]), 'RGBA').save(path)
  read = label_files.open_label(path)
  assert read.pixels.tolist() == [[color[:3] for color in colors]]
  colors[3][3] = 255  # black that shows, and black that does not
  Image.fromarray(np.uint8([colors]), 'RGBA').save(path)
  assert 'transparent' in _refused(path)
