import colorsys
import types
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from deeplab_jax.data import transforms
from deeplab_jax.runtime.errors import UserError


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
    transforms.RandomScaleCropFlip((16, 16), flip=1, rotate=20, max_share=0.1),
    transforms.ColorJitter((0.5, 0.5, 0.5, 0.5)),
    transforms.GaussianBlur(3.0),
    transforms.GaussianNoise(9.0),
    transforms.Cutout(0.5),
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
    transforms.RandomScaleCropFlip((33, 33), rotate=30, max_share=0.3),
    transforms.ColorJitter((0.3, 0.3, 0.3, 0.1)),
    transforms.GaussianBlur(2.0),
    transforms.GaussianNoise(9.0),
    transforms.Cutout(0.4),
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
    (lambda: _window(rotate=181), 'rotate must be 0 to 180 .* 181'),
    (lambda: _window(max_share=0), 'crop_max_share must be above 0, .* got 0'),
    (lambda: transforms.GaussianBlur(-1), 'blur must be 0 to 100, got -1'),
    (lambda: transforms.GaussianNoise(256), 'noise must be 0 to 255, got 256'),
    (lambda: transforms.Cutout(1.1), 'cutout must be 0 to 1, got 1.1'),
    (lambda: _of_recipe('recipe.blur'), "--config=RECIPE, got 'recipe.blur'"),
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


class _Drawn:
  """A generator of given uniform draws; windows start at 0, nothing mirrors."""

  def __init__(self, *values):
    self._values = list(values)

  def uniform(self, low, high):
    value = self._values.pop(0)
    assert low <= value <= high
    return value

  def integers(self, *_, **__):
    return 0

  def random(self):
    return 0.9


def test_a_quarter_turn_moves_every_pixel_as_rot90_does():
  label = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
  by_hand = [[3, 6, 9], [2, 5, 8], [1, 4, 7]]  # counterclockwise
  image = np.stack([20 * label, label, 255 - label], -1)
  turn = transforms.RandomScaleCropFlip((3, 3), (1, 1), 0, rotate=90)
  turned, turned_label = turn(image, label, _Drawn(1, 90))
  assert turned_label.tolist() == by_hand
  np.testing.assert_array_equal(turned, np.rot90(image))
  turned, turned_label = turn(image, label, _Drawn(1, -90))
  np.testing.assert_array_equal(turned_label, np.rot90(label, -1))
  np.testing.assert_array_equal(turned, np.rot90(image, -1))


def test_an_angle_of_zero_shows_what_no_rotation_shows():
  image, label = _scene(90, 120)
  for factor in (0.7, 1.6):
    plain = transforms.RandomScaleCropFlip((50, 64), (factor, factor), 0)
    turn = transforms.RandomScaleCropFlip((50, 64), (factor, factor), 0, 30)
    expected, expected_label = plain(image, label, _Drawn(factor))
    found, found_label = turn(image, label, _Drawn(factor, 0))
    inside = np.s_[1:-1, 1:-1]  # at the border of the image the padding mixes
    difference = found[inside].astype(int) - expected[inside]
    assert np.abs(difference).max() <= 4  # OpenCV takes 1/32 of a pixel
    assert (found_label == expected_label)[inside].mean() > 0.99


def _turned_by_hand(size, factor, degrees, mirrored, image, label):
  """Bilinear and nearest values, pixel by pixel, in float64."""
  sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
  out, mask = np.empty((*size, 3)), np.empty(size, int)
  for v, u in np.ndindex(*size):
    # The pixel that is shown here lies clockwise of it, about the center.
    x, y = u - (size[1] - 1) / 2, v - (size[0] - 1) / 2
    x, y = cosine * x - sine * y, sine * x + cosine * y
    x = -x if mirrored else x
    x = (x + size[1] / 2) / factor - 0.5
    y = (y + size[0] / 2) / factor - 0.5
    colors, left, top = np.zeros(3), int(np.floor(x)), int(np.floor(y))
    for j, i in np.ndindex(2, 2):
      weight = (y - top if j else 1 - y + top) * (
        x - left if i else 1 - x + left
      )
      row, column = top + j, left + i
      seen = 0 <= row < label.shape[0] and 0 <= column < label.shape[1]
      color = image[row, column] if seen else transforms.MEAN_COLOR
      colors += weight * np.asarray(color, float)
    out[v, u] = colors
    row, column = round(y), round(x)
    seen = 0 <= row < label.shape[0] and 0 <= column < label.shape[1]
    mask[v, u] = label[row, column] if seen else 255
  return out, mask


@pytest.mark.parametrize('degrees', [-137, 12, 45])
@pytest.mark.parametrize('mirrored', [False, True])
def test_a_turned_window_is_what_is_computed_by_hand(degrees, mirrored):
  y, x = np.mgrid[:40, :48]
  image = np.stack([4 * x, 5 * y, 2 * x + 2 * y], -1).astype(np.uint8)
  label = (y // 8 + x // 12).astype(np.uint8)
  turn = transforms.RandomScaleCropFlip((20, 32), (2, 2), mirrored, rotate=180)
  found = turn(image, label, _Drawn(2, degrees))
  expected = _turned_by_hand((20, 32), 2, degrees, mirrored, image, label)
  difference = np.abs(found[0] - expected[0])
  near_void = np.ones((3, 3), np.uint8)
  edge = cv2.dilate((expected[1] == 255).astype(np.uint8), near_void) > 0
  # OpenCV 4 rounds places to 1/32 pixel.
  assert difference[~edge].max() <= 2
  assert (found[1] == expected[1]).mean() > 0.98
  assert (expected[1] == 255).any()


def test_rotation_takes_any_channels_and_depth():
  label = np.arange(12, dtype=np.uint8).reshape(3, 4)
  for count, kind in ((1, np.uint8), (4, np.uint16), (7, np.uint16)):
    image = np.stack([label.astype(kind) * (i + 1) for i in range(count)], -1)
    for size in ((3, 3), (5, 5)):
      fill = tuple(range(900, 900 + count)) if kind is np.uint16 else (9,)
      turn = transforms.RandomScaleCropFlip(
        size, (1, 1), 0, rotate=90, fill=fill
      )
      turned, turned_label = turn(image, label, _Drawn(1, 90))
      assert turned.dtype == kind and turned.shape == (*size, count)
      for value in label.flat:
        seen = turned[turned_label == value]
        assert (seen == value * np.arange(1, count + 1)).all()
      assert (turned[turned_label == 255] == fill).all()


def test_angles_are_uniform_up_to_the_largest():
  angles = []

  class Noting:
    def __init__(self):
      self.rng = _rng()

    def uniform(self, low, high):
      angles.append(self.rng.uniform(low, high))
      return angles[-1]

    def __getattr__(self, name):
      return getattr(self.rng, name)

  image, label = _scene(9, 9)
  turn, rng = transforms.RandomScaleCropFlip((9, 9), rotate=10), Noting()
  for _ in range(500):
    turn(image, label, rng)
  angles = np.array(angles[1::2])  # every other one is a scale
  assert np.abs(angles).max() <= 10 and np.abs(angles.mean()) < 0.8
  assert angles.std() == pytest.approx(20 / 12**0.5, rel=0.1)


def test_a_crop_that_one_class_fills_is_drawn_again():
  # The left half is one class, and void; the right one is two in stripes.
  label = np.zeros((40, 80), np.uint8)
  label[:, 40:] = 1 + np.arange(40) % 2
  label[:10, :40] = 255
  image = np.stack([label] * 3, -1)
  crop = transforms.RandomScaleCropFlip((20, 20), (1, 1), max_share=0.6)
  plain = transforms.RandomScaleCropFlip((20, 20), (1, 1))
  rng, shares, before = _rng(), [], []
  for transform, found in ((crop, shares), (plain, before)):
    for _ in range(300):
      window, seen = transform(image, label, rng)
      np.testing.assert_array_equal(window[..., 0], seen)
      counts = np.bincount(seen[seen != 255], minlength=3)
      found.append(counts.max() / max(counts.sum(), 1))
  # A place is drawn 11 times, and 17 of 61 columns do: (44 / 61)^11 = 0.03.
  filled = np.mean(np.array(shares) > 0.6)
  assert filled < 0.08 < 0.5 < np.mean(np.array(before) > 0.6)


def test_a_crop_of_void_alone_is_drawn_again_and_hopeless_ones_end():
  label = np.full((10, 40), 255, np.uint8)
  label[:, ::20] = np.array([1, 2])
  image = np.zeros((10, 40, 3), np.uint8)
  half = transforms.RandomScaleCropFlip((10, 10), (1, 1), max_share=0.9)
  draws = []

  class Counting:
    uniform = random = staticmethod(lambda *_: 1.0)

    def integers(self, *_, **__):
      draws.append(0)
      return 0

  half(image, label, Counting())
  assert len(draws) == 2 * 11  # row and column, the first and ten more
  draws.clear()
  label[:, 1] = 2
  half(image, label, Counting())
  assert len(draws) == 2


def test_the_largest_share_counts_in_the_turned_window():
  # Straight, the window is of one class; turned by 45 degrees its corners show
  # the other: of a square of side 1 they are 0.172.
  label = np.ones((60, 60), np.uint8)
  label[20:40, 20:40] = 0
  image = np.zeros((60, 60, 3), np.uint8)
  turned = transforms.RandomScaleCropFlip((20, 20), (1, 1), 0, 45, 0.9)
  drawn = _Drawn(1, 45)
  drawn.integers = lambda high, endpoint: 20
  _, seen = turned(image, label, drawn)
  assert (seen == 0).mean() == pytest.approx(2 * (2**0.5 - 1), abs=0.03)


def test_blur_is_the_gaussian_of_the_sigma_drawn():
  image = np.zeros((41, 41, 3), np.uint8)
  image[20, 20] = 250, 100, 0
  label = np.zeros((41, 41), np.uint8)
  blurred, same = transforms.GaussianBlur(2.0)(image, label, _Drawn(1.5))
  assert same is label and blurred.dtype == np.uint8
  x = np.arange(-20, 21)
  gauss = np.exp(-(x**2) / (2 * 1.5**2))
  gauss = np.outer(gauss, gauss) / gauss.sum() ** 2
  np.testing.assert_allclose(blurred[..., 0], 250 * gauss, atol=1)
  np.testing.assert_allclose(blurred[..., 1], 100 * gauss, atol=1)
  assert not blurred[..., 2].any()
  np.testing.assert_array_equal(
    transforms.GaussianBlur(2.0)(image, label, _Drawn(0.0))[0], image
  )


@pytest.mark.parametrize('kind, levels', [(np.uint8, 1), (np.uint16, 257)])
def test_noise_has_the_sigma_drawn_in_every_channel(kind, levels):
  image = np.full((120, 150, 3), 120 * levels, kind)
  image[0] = 0
  label = np.zeros((120, 150), np.uint8)

  def noisy(seed):
    rng = _rng(seed)
    rng = types.SimpleNamespace(
      uniform=lambda *_: 8.0, integers=lambda high: rng_of[seed](high)
    )
    return transforms.GaussianNoise(10.0)(image, label, rng)

  rng_of = {seed: _rng(seed).integers for seed in range(2)}
  found, same = noisy(0)
  assert same is label and found.dtype == kind
  added = found[1:].astype(float) - 120 * levels
  for channel in range(3):
    own = added[..., channel]
    # 17,850 values: the mean has a deviation of 0.06, the sigma of 0.04.
    assert abs(own.mean()) < 0.25 * levels
    assert own.std() == pytest.approx(8 * levels, rel=0.03)
    within = np.mean(np.abs(own) < 8 * levels)
    assert within == pytest.approx(0.683, abs=0.04)
  # Neither channels nor neighbors share their noise.
  assert (
    abs(np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1]) < 0.03
  )
  assert abs((added[:, 1:] * added[:, :-1]).mean()) < 2 * levels**2
  assert (found[0] == 0).mean() == pytest.approx(0.5, abs=0.1)  # clipped
  assert (noisy(1)[0] != found).any()


def test_noise_is_a_pure_function_of_the_generator_in_any_thread():
  image, label = _scene(30, 40)
  noise = transforms.GaussianNoise(20.0)
  expected = [noise(image, label, _rng(seed))[0] for seed in range(20)]
  with ThreadPoolExecutor(4) as pool:
    found = pool.map(lambda seed: noise(image, label, _rng(seed))[0], range(20))
    np.testing.assert_array_equal(list(found), expected)


def test_cutout_fills_a_rectangle_anywhere_and_keeps_the_label():
  image, label = np.zeros((40, 60, 3), np.uint8), _scene(40, 60)[1]
  cut, rng = transforms.Cutout(0.5), _rng()
  areas, corners = [], set()
  for _ in range(400):
    result, same = cut(image, label, rng)
    assert same is label
    filled = (result == transforms.MEAN_COLOR).all(-1)
    assert not result[~filled].any()
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    assert filled.sum() == len(rows) * len(columns)  # one rectangle
    areas.append(filled.sum())
    corners.add((rows[0] == 0, columns[0] == 0))
  assert max(areas) == 20 * 30 and len(corners) == 4
  # Of each side three quarters lie inside, on the mean over all centers.
  of_axis = [
    np.mean([min(c + s // 2, n) - max(c - s // 2, 0) for c in range(n)])
    for n, s in ((40, 20), (60, 30))
  ]
  assert np.mean(areas) == pytest.approx(np.prod(of_axis), rel=0.05)
  assert not image.any()


def _of_recipe(function):
  return transforms.OfRecipe(function, num_classes=3, ignore_label=255)


def test_a_function_of_a_recipe_gets_what_there_is_and_gives_what_follows():
  image, label = np.zeros((4, 5, 3), np.uint8), np.eye(4, 5, dtype=np.uint8)

  def mirror(image, label, rng):
    return (image + np.uint8(rng.integers(5)))[:, ::-1], label[:, ::-1]

  found = _of_recipe(mirror)(image, label, _rng(1))
  assert (found[0] == _rng(1).integers(5)).all()
  np.testing.assert_array_equal(found[1], np.eye(4, 5)[:, ::-1])


@pytest.mark.parametrize(
  'function, message',
  [
    (lambda image, label, rng: (image / 255, label), r'float64 \[4, 5, 3\]'),
    (lambda image, label, rng: (image[:2], label), r'got uint8 \[2, 5, 3\]'),
    (lambda image, label, rng: (image, label[1:]), r'uint8 \[3, 5\]'),
    (lambda image, label, rng: (image, label + 3), 'the value 3, which'),
    (lambda image, label, rng: (image, label + 0.0), 'float64'),
    (lambda image, label, rng: image, 'failed: too many values'),
    (lambda image, label: (image, label), 'failed: .* takes 2'),
    (lambda image, label, rng: (image, None), 'failed: .*NoneType'),
    (lambda image, label, rng: 1 / 0, 'failed: division by zero'),
  ],
)
def test_a_function_that_does_wrong_is_named_in_one_line(function, message):
  image, label = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
  function.__name__ = 'own_blur'
  with pytest.raises(UserError, match=message) as error:
    _of_recipe(function)(image, label, _rng())
  assert str(error.value).startswith('config.data.transforms: own_blur ')
  assert '\n' not in str(error.value)


def test_classes_and_void_may_be_anywhere_after_a_function():
  image = np.zeros((2, 2, 3), np.uint8)
  label = np.array([[0, 1], [2, 255]], np.uint8)
  found = _of_recipe(lambda *pair: pair[:2])(image, label, None)
  assert found == (image, label) or found[1] is label


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


def test_blur_keeps_a_single_channel():
  image, label = np.zeros((9, 8, 1), np.uint16), np.zeros((9, 8), np.uint8)
  found, _ = transforms.GaussianBlur(2.0)(image, label, _rng())
  assert found.shape == image.shape
