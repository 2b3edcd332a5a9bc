"""Images as stored: what is read, kept and refused."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import bands, images
from deeplab_jax.data.datasets import DatasetInfo, Tally, voc_palette
from deeplab_jax.runtime.errors import UserError

KINDS = [(c, d) for c in (1, 3, 4, 6) for d in (np.uint8, np.uint16)]


def noise(channels, dtype=np.uint16, size=(7, 5)):
  rng = np.random.default_rng(channels)
  return rng.integers(0, np.iinfo(dtype).max, (*size, channels), dtype, True)


def read(path):
  return images.open_picture(path, as_stored=True)


def write_png(path, image):
  order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[image.shape[2]]
  cv2.imwrite(str(path), image[..., order])


@pytest.mark.parametrize('channels, dtype', KINDS)
def test_an_array_is_read_and_kept_bit_for_bit(tmp_path, channels, dtype):
  image = noise(channels, dtype)
  np.save(tmp_path / 'a.npy', image)
  picture = read(tmp_path / 'a.npy')
  np.testing.assert_array_equal(picture.pixels, image)
  kept = images.decode_image(picture.storable())
  assert kept.dtype == dtype
  np.testing.assert_array_equal(kept, image)


@pytest.mark.parametrize(
  'channels, dtype', [kind for kind in KINDS if kind[0] < 6]
)
def test_a_png_is_read_and_kept_bit_for_bit(tmp_path, channels, dtype):
  image, path = noise(channels, dtype), tmp_path / 'a.png'
  write_png(path, image)
  picture = read(path)
  assert picture.pixels.dtype == dtype
  np.testing.assert_array_equal(picture.pixels, image)
  kept = images.decode_image(picture.storable())
  np.testing.assert_array_equal(kept, image)
  assert images.read_size(path, as_stored=True) == image.shape[:2]


@pytest.mark.parametrize('channels, dtype', KINDS)
@pytest.mark.parametrize('planes', ['contig', 'separate'])
def test_a_tiff_is_read_bit_for_bit(tmp_path, channels, dtype, planes):
  tifffile = pytest.importorskip('tifffile')
  image, path = noise(channels, dtype), tmp_path / 'a.tif'
  stored = image if planes == 'contig' else np.moveaxis(image, -1, 0)
  settings = {'planarconfig': planes} if channels > 1 else {}
  stored = stored if channels > 1 else image[..., 0]
  tifffile.imwrite(path, stored, photometric='minisblack', **settings)
  np.testing.assert_array_equal(read(path).pixels, image)
  assert images.read_size(path, as_stored=True) == image.shape[:2]


@pytest.mark.parametrize('orientation, size', [(1, (40, 30)), (6, (30, 40))])
def test_the_size_is_read_without_the_pixels(tmp_path, orientation, size):
  tifffile = pytest.importorskip('tifffile')
  image = noise(4, size=(40, 30))
  np.save(tmp_path / 'a.npy', image)
  tag = [(274, 'H', 1, orientation, True)]
  settings = {'photometric': 'minisblack', 'planarconfig': 'contig'}
  tifffile.imwrite(tmp_path / 'a.tif', image, extratags=tag, **settings)
  for name, expected in (('a.npy', (40, 30)), ('a.tif', size)):
    path = tmp_path / name
    assert read(path).pixels.shape[:2] == expected
    data = path.read_bytes()[:-5000]
    path.write_bytes(data)
    assert images.read_size(path, as_stored=True) == expected
    assert images.read_size('image', data, as_stored=True) == expected
    with pytest.raises(UserError, match='unreadable image'):
      read(path)


def test_heads_of_arrays_of_any_version_and_of_no_image(tmp_path):
  path = tmp_path / 'a.npy'
  for version in ((1, 0), (2, 0), (3, 0)):
    with path.open('wb') as file:
      np.lib.format.write_array(file, noise(2), version)
    assert images.read_size(path, as_stored=True) == (7, 5)
  for array in (np.zeros(4, np.uint8), np.array([print])):
    np.save(path, array)
    with pytest.raises(UserError, match=r'a\.npy: unreadable image'):
      images.read_size(path, as_stored=True)


def test_a_tiff_of_pages_or_cut_off_is_refused(tmp_path):
  tifffile = pytest.importorskip('tifffile')
  path = tmp_path / 'a.tif'
  tifffile.imwrite(path, noise(5), photometric='minisblack', metadata=None)
  with pytest.raises(UserError, match=r'a\.tif: axes .*; store one page'):
    read(path)
  image = noise(6, size=(40, 40))
  tifffile.imwrite(path, image, planarconfig='contig', photometric='minisblack')
  path.write_bytes(path.read_bytes()[:-300])
  with pytest.raises(UserError, match=r'a\.tif: unreadable image'):
    read(path)


def test_a_tiff_of_a_million_pixels_is_not_too_large(tmp_path):
  tifffile = pytest.importorskip('tifffile')
  path = tmp_path / 'a.tif'
  image = np.zeros((1100, 1000, 2), np.uint16)
  tifffile.imwrite(path, image, planarconfig='contig', photometric='minisblack')
  assert bands.read_stored(path)[0].shape == image.shape


def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tifffile', None)
  Image.new('L', (4, 4)).save(tmp_path / 'a.tif')
  with pytest.raises(UserError, match=r"pip install 'deeplab_jax\[tiff\]'"):
    read(tmp_path / 'a.tif')


def test_gray_with_alpha_has_two_channels(tmp_path):
  image = noise(2, np.uint8)
  Image.fromarray(image, 'LA').save(tmp_path / 'a.png')
  np.testing.assert_array_equal(read(tmp_path / 'a.png').pixels, image)


def test_images_are_turned_upright(tmp_path):
  exif = Image.Exif()
  exif[274] = 6  # to be turned by 90 degrees clockwise
  gray = noise(1, np.uint8)[..., 0]
  Image.fromarray(gray).save(tmp_path / 'a.png', exif=exif)
  picture = read(tmp_path / 'a.png')
  assert picture.orientation == 6
  np.testing.assert_array_equal(picture.pixels[..., 0], np.rot90(gray, -1))
  kept = images.decode_image(picture.storable())
  np.testing.assert_array_equal(kept, picture.pixels)


def test_a_jpeg_in_color_is_kept_as_it_is(tmp_path):
  Image.fromarray(noise(3, np.uint8)).save(tmp_path / 'a.jpg')
  picture = read(tmp_path / 'a.jpg')
  assert picture.storable() == (tmp_path / 'a.jpg').read_bytes()


@pytest.mark.parametrize(
  'array, message',
  [
    (np.zeros((4, 4, 2), np.float32), r'float32 \[4, 4, 2\]; store uint8'),
    (np.zeros((4, 4), np.int16), r'int16 \[4, 4, 1\]; store uint8'),
    (np.zeros((2, 4, 4, 3), np.uint8), r'uint8 \[2, 4, 4, 3\]; store'),
    (np.zeros((4, 4, 129), np.uint8), 'at most 128 channels'),
    (np.array([print]), 'unreadable image'),  # a pickle
  ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
  np.save(tmp_path / 'a.npy', array)
  with pytest.raises(UserError, match=message) as error:
    read(tmp_path / 'a.npy')
  assert str(tmp_path / 'a.npy') in str(error.value)
  assert '\n' not in str(error.value)


def test_missing_and_cut_off_files_are_named(tmp_path):
  with pytest.raises(UserError, match=r'a\.npy: no such file'):
    read(tmp_path / 'a.npy')
  file = io.BytesIO()
  np.save(file, noise(4))
  for length in (7, 60, len(file.getvalue()) - 1):
    (tmp_path / 'a.npy').write_bytes(file.getvalue()[:length])
    with pytest.raises(UserError, match=r'a\.npy: unreadable image'):
      read(tmp_path / 'a.npy')


def test_big_endian_arrays_are_read(tmp_path):
  np.save(tmp_path / 'a.npy', noise(2).astype('>u2'))
  np.testing.assert_array_equal(read(tmp_path / 'a.npy').pixels, noise(2))


def test_an_array_where_pictures_are_meant_names_the_setting(tmp_path):
  np.save(tmp_path / 'a.npy', noise(3, np.uint8))
  with pytest.raises(UserError, match=r'set config\.data\.as_stored=True'):
    images.read_image(tmp_path / 'a.npy')


@pytest.mark.parametrize('change', [slice(0, 6), slice(0, -20)])
def test_a_damaged_record_is_no_image(change):
  with pytest.raises(ValueError, match='no image'):
    images.decode_image(images.encode_image(noise(6))[change])


@pytest.mark.parametrize('channels, dtype', KINDS)
def test_mean_and_std_are_those_of_numpy(channels, dtype):
  shown = [noise(channels, dtype, size) for size in ((7, 5), (3, 8), (4, 4))]
  tally = Tally(2, 255)
  for image in shown:
    tally.add(np.zeros(image.shape[:2], np.uint8))
    tally.add_image(image)
  found = Tally.from_json(tally.to_json()).describe_images()
  pixels = np.concatenate([image.reshape(-1, channels) for image in shown])
  assert found['bits'] == 8 * pixels.itemsize
  np.testing.assert_allclose(found['mean'], pixels.mean(0), rtol=1e-12)
  np.testing.assert_allclose(found['std'], pixels.std(0), rtol=1e-9)
  info = DatasetInfo('set', ('a', 'b'), voc_palette(2), **found)
  assert info.fill.dtype == dtype
  np.testing.assert_array_equal(info.fill, np.rint(pixels.mean(0)))
  assert DatasetInfo.from_json(info.to_json()).mean == info.mean


def test_a_channel_of_one_value_has_the_std_1():
  tally = Tally(2, 255)
  tally.add(np.zeros((9, 9), np.uint8))
  tally.add_image(np.full((9, 9, 1), 60_001, np.uint16))
  assert tally.describe_images()['std'] == [1]


def test_descriptions_of_older_versions_mean_rgb():
  info = DatasetInfo('set', ('a', 'b'), voc_palette(2))
  new = ('bits', 'mean', 'std')
  old = {k: v for k, v in info.to_json().items() if k not in new}
  again = DatasetInfo.from_json(old)
  assert again.normalization == {}
  assert again.fill.tolist() == [124, 117, 104]
  tally = Tally(2, 255).to_json()
  old = {k: v for k, v in tally.items() if k not in ('bits', 'moments', 'kind')}
  assert Tally.from_json(old).describe_images() == {}


def test_only_images_of_the_networks_kind_are_taken(tmp_path):
  info = DatasetInfo('set', ('a',), voc_palette(1), bits=16, mean=[9], std=[1])
  image = noise(1)
  np.testing.assert_array_equal(images.as_pixels(image[..., 0], info), image)
  np.save(tmp_path / 'a.npy', noise(4))
  for given in (noise(1, np.uint8), noise(3), tmp_path / 'a.npy'):
    with pytest.raises(UserError, match=r'must be uint16 \[H, W, 1\]') as error:
      images.as_pixels(given, info)
  assert str(error.value).startswith(str(tmp_path / 'a.npy'))
