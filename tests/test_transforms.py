import colorsys

import numpy as np
import pytest

from deeplab_jax.data import transforms


def _scene(height=37, width=53, seed=0):
  """An image that carries its label in all channels, in blocks of 4 pixels."""
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 6, (-(-height // 4), -(-width // 4)), np.uint8) * 40
  label = np.kron(blocks, np.ones((4, 4), np.uint8))[:height, :width]
  return np.stack([label] * 3, -1), label.copy()


def _rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize('seed', range(5))
def test_scale_invents_no_label_and_keeps_it_on_its_pixels(seed):
  image, label = _scene()
  scaled, scaled_label = transforms.RandomScale(0.5, 2)(
    image, label, _rng(seed)
  )
  assert scaled.shape[:2] == scaled_label.shape
  assert set(np.unique(scaled_label)) <= set(np.unique(label))
  # away from the edges of blocks, bilinear and nearest agree
  assert np.mean(np.abs(scaled[..., 0].astype(int) - scaled_label) <= 1) > 0.3
  correlation = np.corrcoef(scaled[..., 0].ravel(), scaled_label.ravel())
  assert correlation[0, 1] > 0.9


def test_scale_by_two_repeats_every_label_pixel_twice():
  image, label = _scene()
  _, doubled = transforms.RandomScale(2, 2)(image, label, _rng())
  np.testing.assert_array_equal(doubled, label.repeat(2, 0).repeat(2, 1))


def test_scale_draws_factors_over_the_whole_range():
  image, label = _scene(100, 200)
  rng = _rng()
  shapes = [
    transforms.RandomScale(0.5, 2)(image, label, rng)[1].shape
    for _ in range(200)
  ]
  heights = np.array([shape[0] for shape in shapes])
  assert 50 <= heights.min() < 60 and 190 < heights.max() <= 200
  assert abs(heights.mean() - 125) < 8  # uniform in the factor
  assert all(abs(width - 2 * height) <= 2 for height, width in shapes)


def test_scale_never_loses_the_last_pixel():
  image, label = _scene(1, 1)
  scaled, _ = transforms.RandomScale(0.1, 0.1)(image, label, _rng())
  assert scaled.shape == (1, 1, 3)


@pytest.mark.parametrize('seed', range(5))
def test_crop_cuts_image_and_label_at_the_same_place(seed):
  image, label = _scene()
  crop = transforms.RandomCrop((16, 24))
  cut, cut_label = crop(image, label, _rng(seed))
  assert cut.shape == (16, 24, 3) and cut_label.shape == (16, 24)
  np.testing.assert_array_equal(cut[..., 1], cut_label)


def test_crop_reaches_every_place_about_equally_often():
  label = np.arange(12, dtype=np.uint8).reshape(3, 4)
  image = np.stack([label] * 3, -1)
  crop = transforms.RandomCrop((2, 2))
  rng = _rng()
  corners = [crop(image, label, rng)[1][0, 0] for _ in range(1200)]
  places, counts = np.unique(corners, return_counts=True)
  assert places.tolist() == [0, 1, 2, 4, 5, 6]
  assert counts.min() > 140 and counts.max() < 260


def test_crop_pads_bottom_and_right_with_fill_and_void():
  image, label = _scene(10, 40)
  crop = transforms.RandomCrop((16, 16), fill=(1, 2, 3), ignore_label=99)
  cut, cut_label = crop(image, label, _rng())
  np.testing.assert_array_equal(cut[:10, :, 0], cut_label[:10])
  assert (cut[10:] == (1, 2, 3)).all() and (cut_label[10:] == 99).all()


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
  flipped, flipped_label = transforms.RandomFlip(1)(image, label, _rng())
  np.testing.assert_array_equal(flipped, image[:, ::-1])
  np.testing.assert_array_equal(flipped_label, label[:, ::-1])
  same, same_label = transforms.RandomFlip(0)(image, label, _rng())
  np.testing.assert_array_equal(same, image)
  np.testing.assert_array_equal(same_label, label)


def test_flip_happens_as_often_as_asked():
  image, label = _scene()
  rng = _rng()
  flip = transforms.RandomFlip(0.25)
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
    jitter = transforms.ColorJitter(**{name: 0.4})
    result, same = jitter(image, label, _Fixed(1.3))
    assert result.dtype == np.uint8 and same is label
    np.testing.assert_allclose(result, np.clip(value, 0, 255), atol=1.01)


def test_hue_turns_colours_as_colorsys_does():
  image = _rng(1).integers(0, 256, (6, 6, 3), np.uint8)
  label = np.zeros((6, 6), np.uint8)
  result, _ = transforms.ColorJitter(hue=0.5)(image, label, _Fixed(0.25))
  for before, after in zip(
    image.reshape(-1, 3), result.reshape(-1, 3), strict=True
  ):
    hue, saturation, value = colorsys.rgb_to_hsv(*before / 255)
    turned = colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)
    # uint8 HSV: 1.5 steps of 1/256 turn, each six levels of RGB
    np.testing.assert_allclose(after, np.array(turned) * 255, atol=9)


def test_jitter_leaves_its_input_alone():
  image, label = _scene()
  before = image.copy()
  transforms.ColorJitter(0.5, 0.5, 0.5, 0.5)(image, label, _rng())
  np.testing.assert_array_equal(image, before)


def test_all_together_are_a_pure_function_of_the_generator():
  image, label = _scene()
  chain = (
    transforms.RandomScale(),
    transforms.RandomCrop((33, 33)),
    transforms.RandomFlip(),
    transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
  )
  first = transforms.apply_transforms(chain, image, label, _rng(3))
  again = transforms.apply_transforms(chain, image, label, _rng(3))
  other = transforms.apply_transforms(chain, image, label, _rng(4))
  np.testing.assert_array_equal(first[0], again[0])
  np.testing.assert_array_equal(first[1], again[1])
  assert (first[0] != other[0]).any()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: transforms.RandomScale(2, 1), '2 and 1'),
    (lambda: transforms.RandomScale(0, 1), '0 and 1'),
    (lambda: transforms.RandomCrop((0, 5)), r'\(0, 5\)'),
    (lambda: transforms.RandomCrop((5, 5), fill=(0, 0, 300)), '300'),
    (lambda: transforms.RandomCrop((5, 5), ignore_label=256), '256'),
    (lambda: transforms.RandomFlip(1.5), '1.5'),
    (lambda: transforms.ColorJitter(brightness=-1), 'brightness.*-1'),
    (lambda: transforms.ColorJitter(hue=0.6), 'hue.*0.6'),
  ],
)
def test_wrong_arguments_are_shown(make, message):
  with pytest.raises(ValueError, match=message):
    make()
