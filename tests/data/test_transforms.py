import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.data import transforms


def _scene(height=37, width=53, seed=0):
  """An image that carries its label in all channels, in blocks of 4 pixels."""
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 6, (-(-height // 4), -(-width // 4)), np.uint8) * 40
  label = np.kron(blocks, np.ones((4, 4), np.uint8))[:height, :width]
  return np.stack([label] * 3, -1), label.copy()


def _rng(seed=0):
  return np.random.default_rng(seed)


def _unfused(size, scale, flip, image, label, rng):
  """What the window shows of the whole scaled image, mirrored."""
  factor = rng.uniform(*scale)
  height, width = (max(1, round(n * factor)) for n in label.shape)
  image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  label = cv2.resize(
    label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT
  )
  top = rng.integers(max(height - size[0], 0), endpoint=True)
  left = rng.integers(max(width - size[1], 0), endpoint=True)
  image = image[top : top + size[0], left : left + size[1]]
  label = label[top : top + size[0], left : left + size[1]]
  pads = [(0, s - n) for s, n in zip(size, label.shape, strict=True)]
  image = np.stack(
    [
      np.pad(image[..., i], pads, constant_values=fill)
      for i, fill in enumerate(transforms.MEAN_COLOR)
    ],
    -1,
  )
  label = np.pad(label, pads, constant_values=255)
  if rng.random() < flip:
    image, label = image[:, ::-1], label[:, ::-1]
  return image, label


@pytest.mark.parametrize('scale', [(0.5, 2.0), (0.9, 0.9)])
@pytest.mark.parametrize('seed', range(4))
def test_a_window_of_the_whole_is_the_whole_scaled_padded_and_mirrored(
  seed, scale
):
  image, label = _scene()
  image = _rng(seed).integers(0, 256, image.shape, np.uint8)
  size = 80, 110  # more than twice the scene
  transform = transforms.RandomScaleCropFlip(size, scale)
  result = transform(image, label, _rng(seed))
  expected = _unfused(size, scale, 0.5, image, label, _rng(seed))
  # mirroring before or after resizing rounds differently
  difference = np.abs(result[0].astype(int) - expected[0])
  assert difference.max() <= 1
  np.testing.assert_array_equal(result[1], expected[1])


@pytest.mark.parametrize('seed', range(6))
def test_a_window_shows_what_the_scaled_image_has_there(seed):
  # Colours that rise by 1 a pixel: half a pixel of the image is half a level.
  y, x = np.mgrid[:200, :250]
  image = np.stack([y, x, np.full_like(x, 99)], -1).astype(np.uint8)
  label = ((y // 20 + x // 25) % 7).astype(np.uint8)
  size = 97, 129
  transform = transforms.RandomScaleCropFlip(size)
  window, window_label = transform(image, label, _rng(seed))
  expected, expected_label = _unfused(
    size, (0.5, 2.0), 0.5, image, label, _rng(seed)
  )
  inside = expected_label != 255
  np.testing.assert_array_equal(window_label == 255, ~inside)
  difference = window.astype(float) - expected
  assert np.abs(difference[inside]).max() <= 1.5
  assert np.abs(difference[inside]).mean() < 0.5
  assert (window_label == expected_label).mean() > 0.94


@pytest.mark.parametrize('seed', range(5))
def test_scaling_invents_no_label(seed):
  image, label = _scene()
  transform = transforms.RandomScaleCropFlip((60, 60))
  _, scaled = transform(image, label, _rng(seed))
  assert set(np.unique(scaled)) <= {*np.unique(label), 255}


@pytest.mark.parametrize('size', [(60, 60), (61, 47), (200, 150)])
def test_no_class_appears_between_two_others(size):
  rng = _rng()
  label = 2 * rng.integers(0, 2, (97, 123)).astype(np.uint8)
  image = np.zeros((97, 123, 3), np.uint8)
  _, seen = transforms.CenterCrop(size)(image, label, rng)
  assert set(np.unique(seen)) == {0, 2}
  scaled = transforms.RandomScaleCropFlip(size, (0.3, 3.0))
  for _ in range(20):
    _, seen = scaled(image, label, rng)
    assert {0, 2} <= set(np.unique(seen)) <= {0, 2, 255}


def test_scale_by_two_repeats_every_label_pixel_twice():
  image, label = _scene()
  transform = transforms.RandomScaleCropFlip((74, 106), (2, 2), flip=0)
  _, doubled = transform(image, label, _rng())
  np.testing.assert_array_equal(doubled, label.repeat(2, 0).repeat(2, 1))


def test_scale_draws_factors_over_the_whole_range():
  image, label = _scene(100, 200)
  rng = _rng()
  transform = transforms.RandomScaleCropFlip((200, 400), flip=0)
  masks = [transform(image, label, rng)[1] != 255 for _ in range(200)]
  heights = np.array([mask[:, 0].sum() for mask in masks])
  widths = np.array([mask[0].sum() for mask in masks])
  assert 50 <= heights.min() < 60 and 190 < heights.max() <= 200
  assert abs(heights.mean() - 125) < 8  # uniform in the factor
  assert (np.abs(widths - 2 * heights) <= 2).all()


@pytest.mark.parametrize('factor', [0.1, 9.7])
def test_a_single_pixel_stays_one_colour(factor):
  image, label = _scene(1, 1)
  transform = transforms.RandomScaleCropFlip((4, 4), (factor, factor), flip=0)
  window, window_label = transform(image, label, _rng())
  inside = window_label != 255
  assert inside[0, 0] and inside.all() == (factor > 1)
  assert (window[inside] == image[0, 0]).all()


@pytest.mark.parametrize('seed', range(5))
def test_crop_cuts_image_and_label_at_the_same_place(seed):
  image, label = _scene()
  transform = transforms.RandomScaleCropFlip((16, 24), (1, 1))
  cut, cut_label = transform(image, label, _rng(seed))
  assert cut.shape == (16, 24, 3) and cut_label.shape == (16, 24)
  np.testing.assert_array_equal(cut[..., 1], cut_label)


def test_crop_reaches_every_place_about_equally_often():
  label = np.arange(12, dtype=np.uint8).reshape(3, 4)
  image = np.stack([label] * 3, -1)
  crop = transforms.RandomScaleCropFlip((2, 2), (1, 1), flip=0)
  rng = _rng()
  corners = [crop(image, label, rng)[1][0, 0] for _ in range(1200)]
  places, counts = np.unique(corners, return_counts=True)
  assert places.tolist() == [0, 1, 2, 4, 5, 6]
  assert counts.min() > 140 and counts.max() < 260


def test_crop_pads_bottom_and_right_with_fill_and_void():
  image, label = _scene(10, 12)
  crop = transforms.RandomScaleCropFlip(
    (16, 16), (1, 1), flip=0, ignore_label=99
  )
  cut, cut_label = crop(image, label, _rng())
  np.testing.assert_array_equal(cut[:10, :12], image)
  np.testing.assert_array_equal(cut_label[:10, :12], label)
  assert (cut[10:] == transforms.MEAN_COLOR).all() and (
    cut_label[10:] == 99
  ).all()
  assert (cut[:, 12:] == transforms.MEAN_COLOR).all() and (
    cut_label[:, 12:] == 99
  ).all()


@pytest.mark.parametrize(
  'height, width', [(30, 50), (50, 30), (16, 18), (40, 40)]
)
def test_center_crop_resizes_the_shorter_side_and_keeps_the_middle(
  height, width
):
  # Columns and rows count in colours, so that a pixel tells where it was.
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.linspace(0, 240, height).astype(int)[:, None]
  image[..., 1] = np.linspace(0, 240, width).astype(int)
  label = (image[..., 1] > 120).astype(np.uint8)
  out, mask = transforms.CenterCrop((20, 20))(image, label, None)
  assert out.shape == (20, 20, 3) and mask.shape == (20, 20)
  shorter = min(height, width)
  for axis, length in enumerate((height, width)):
    channel = out[..., axis].astype(float)
    profile = channel.mean(1 - axis)
    # The part of the axis that is seen, around its middle.
    assert profile[[0, -1]].mean() == pytest.approx(120, abs=6)
    span = (profile[-1] - profile[0]) * 20 / 19
    assert span == pytest.approx(240 * shorter / length, abs=18)
  assert set(np.unique(mask)) == {0, 1}
  assert abs(int(mask[10].argmax()) - 10) <= 1


def test_center_crop_of_the_size_asked_for_changes_nothing():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (17, 33, 3), np.uint8)
  out, label = transforms.CenterCrop((17, 33))(image, image[..., 0], None)
  np.testing.assert_array_equal(out, image)
  np.testing.assert_array_equal(label, image[..., 0])


def test_flip_mirrors_both_or_neither():
  image, label = _scene()
  for flip in (0, 1):
    transform = transforms.RandomScaleCropFlip(label.shape, (1, 1), flip)
    result = transform(image, label, _rng())
    step = -1 if flip else 1
    np.testing.assert_array_equal(result[0], image[:, ::step])
    np.testing.assert_array_equal(result[1], label[:, ::step])


def test_flip_happens_as_often_as_asked():
  image, label = _scene()
  rng = _rng()
  flip = transforms.RandomScaleCropFlip(label.shape, (1, 1), 0.25)
  flips = [(flip(image, label, rng)[1] != label).any() for _ in range(400)]
  assert 70 < sum(flips) < 130


class _Fixed:
  """A generator that always draws the same number."""

  def __init__(self, value):
    self._value = value

  def uniform(self, low, high):
    assert low <= self._value <= high
    return self._value


def test_jitter_matches_hand_formulas():
  rng = _rng()
  image = rng.integers(0, 256, (8, 9, 3), np.uint8)
  label = np.zeros((8, 9), np.uint8)
  exact = image.astype(float)
  gray = exact @ [0.299, 0.587, 0.114]
  expected = {
    'brightness': exact * 1.3,
    'contrast': 1.3 * exact - 0.3 * gray.mean(),
    'saturation': 1.3 * exact - 0.3 * gray[..., None],
  }
  for name, value in expected.items():
    jitter = transforms.ColorJitter(
      tuple(0.4 * (key == name) for key in (*expected, 'hue'))
    )
    result, same = jitter(image, label, _Fixed(1.3))
    assert result.dtype == np.uint8 and same is label
    np.testing.assert_allclose(result, np.clip(value, 0, 255), atol=1.01)


def test_hue_turns_colours_as_colorsys_does():
  image = _rng(1).integers(0, 256, (6, 6, 3), np.uint8)
  label = np.zeros((6, 6), np.uint8)
  result, _ = transforms.ColorJitter((0, 0, 0, 0.5))(image, label, _Fixed(0.25))
  for before, after in zip(
    image.reshape(-1, 3), result.reshape(-1, 3), strict=True
  ):
    hue, saturation, value = colorsys.rgb_to_hsv(*before / 255)
    turned = colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)
    # uint8 HSV: 1.5 steps of 1/256 turn, each six levels of RGB
    np.testing.assert_allclose(after, np.array(turned) * 255, atol=9)


@pytest.mark.parametrize(
  'transform',
  [
    transforms.RandomScaleCropFlip((16, 16), flip=1),
    transforms.ColorJitter((0.5, 0.5, 0.5, 0.5)),
  ],
)
def test_transforms_leave_their_input_alone(transform):
  image, label = _scene()
  before = image.copy(), label.copy()
  transform(image, label, _rng())
  np.testing.assert_array_equal(image, before[0])
  np.testing.assert_array_equal(label, before[1])


def _apply(chain, image, label, rng):
  for transform in chain:
    image, label = transform(image, label, rng)
  return image, label


def test_all_together_are_a_pure_function_of_the_generator():
  image, label = _scene()
  chain = (
    transforms.RandomScaleCropFlip((33, 33)),
    transforms.ColorJitter((0.3, 0.3, 0.3, 0.1)),
  )
  first = _apply(chain, image, label, _rng(3))
  again = _apply(chain, image, label, _rng(3))
  other = _apply(chain, image, label, _rng(4))
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_array_equal(first[1], again[1])
  assert (first[0] != other[0]).any()


def _window(size=(5, 5), **settings):
  return transforms.RandomScaleCropFlip(size, **settings)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: _window(scale=(2, 1)), r'\(2, 1\)'),
    (lambda: _window(scale=(0, 1)), r'\(0, 1\)'),
    (lambda: _window(size=(0, 5)), r'\(0, 5\)'),
    (lambda: _window(ignore_label=256), '256'),
    (lambda: _window(flip=1.5), '1.5'),
    (lambda: transforms.ColorJitter((-1, 0, 0, 0)), r'from 0.*\(-1, 0, 0, 0\)'),
    (lambda: transforms.ColorJitter((0, 0, 0, 0.6)), r'up to 0.5.* 0.6\)'),
    (lambda: transforms.ColorJitter((0.1, 0.1)), r'four.*\(0.1, 0.1\)'),
    (lambda: _window(scale=(1,)), r'\(1,\)'),
    (lambda: _window(scale=(1, 2**31)), r'below 2\^31'),
    (lambda: _window(size=(5, 5, 3)), r'\(5, 5, 3\)'),
    (lambda: transforms.CenterCrop((5,)), r'\(5,\)'),
  ],
)
def test_wrong_arguments_are_shown(make, message):
  with pytest.raises(ValueError, match=message):
    make()


side = st.integers(1, 60)


@few
@given(
  shape=st.tuples(side, side),
  size=st.tuples(side, side),
  low=st.floats(0.05, 2),
  span=st.floats(1, 4),
  flip=st.sampled_from([0.0, 0.5, 1.0]),
  void=st.sampled_from([0, 77, 255]),
  seed=st.integers(0, 2**32),
)
def test_image_and_label_of_any_size_move_together_into_the_window(
  shape, size, low, span, flip, void, seed
):
  # Each class is a plain color: where both moved alike, they still agree.
  label = np.full(shape, _rng(seed).integers(1, 7), np.uint8)
  label[shape[0] // 2 :] += 7
  image = np.stack([10 * label, label, 255 - label], -1)
  transform = transforms.RandomScaleCropFlip(
    size, (low, low * span), flip, ignore_label=void
  )
  for chain in (transform, transforms.CenterCrop(size)):
    window, seen = chain(image, label, _rng(seed))
    assert window.shape == (*size, 3) and seen.shape == size
    assert window.dtype == seen.dtype == np.uint8
    allowed = {*np.unique(label), *([void] if chain is transform else [])}
    assert set(np.unique(seen)) <= allowed
    padded = (window == transforms.MEAN_COLOR).all(-1)
    if chain is transform:
      np.testing.assert_array_equal(padded, seen == void)
    # Between the halves colors mix; all else shows its own.
    alone = [
      (seen == value)
      & (window == np.uint8([10 * value, value, 255 - value])).all(-1)
      for value in np.unique(label)
    ]
    middle = ~(padded | np.logical_or.reduce(alone)).all(1)
    factor = max(low * span, max(size) / min(shape))
    assert middle.sum() <= 2 * factor + 3


@pytest.mark.parametrize('channels', [1, 4, 6])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_images_of_any_channels_are_cropped_band_by_band(channels, dtype):
  rng = np.random.default_rng(0)
  image = rng.integers(0, np.iinfo(dtype).max, (20, 30, channels), dtype)
  label = rng.integers(0, 9, (20, 30)).astype(np.uint8)
  fill = tuple(range(100, 100 + channels))

  def crop(image, fill):
    cut = transforms.RandomScaleCropFlip((40, 24), fill=fill)
    return cut(image, label, np.random.default_rng(7))

  found, cut = crop(image, fill)
  assert found.shape == (40, 24, channels) and found.dtype == dtype
  assert (cut == 255).any()
  np.testing.assert_array_equal(found[cut == 255], [fill] * (cut == 255).sum())
  for i in range(channels):
    band = image[..., i : i + 1]
    alone = crop(np.concatenate([band] * 3, -1), (fill[i],) * 3)[0][..., 0]
    # Of many channels OpenCV rounds in another order.
    assert np.abs(found[..., i].astype(int) - alone).max() <= 1


@pytest.mark.parametrize('channels', [1, 4])
def test_a_center_crop_keeps_the_channels(channels):
  image = np.full((20, 30, channels), 7, np.uint16)
  label = np.zeros((20, 30), np.uint8)
  crop = transforms.CenterCrop((12, 12))(image, label, None)[0]
  assert crop.shape == (12, 12, channels) and (crop == 7).all()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_brightness_and_contrast_of_any_channels(dtype):
  most = np.iinfo(dtype).max
  rng = np.random.default_rng(0)
  image = rng.integers(0, most, (9, 8, 5), dtype)
  label = np.zeros((9, 8), np.uint8)
  jitter = transforms.ColorJitter((0.5, 0.5, 0.0, 0.0))
  found, _ = jitter(image, label, np.random.default_rng(3))
  rng = np.random.default_rng(3)
  expected = np.clip(np.rint(rng.uniform(0.5, 1.5) * image), 0, most)
  factor = rng.uniform(0.5, 1.5)
  expected = factor * expected + (1 - factor) * expected.mean()
  expected = np.clip(np.rint(expected), 0, most)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, expected)
