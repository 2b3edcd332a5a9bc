"""Pictures checked by their pixels and by reading the files back."""

import io
import os

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from properties import few

from deeplab_jax.data.label_files import open_label
from deeplab_jax.visualize import labels as visualize

VOID = 255
PALETTE = np.array(
  [[0, 0, 0], [200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]],
  np.uint8,
)
CLASSES = ('background', 'circle', 'long_triangle', 'square', 'jpg')


def scene(height=90, width=160):
  """An image, and a label of three blocks with a void column at the right."""
  generator = np.random.default_rng(3)
  image = generator.integers(0, 256, (height, width, 3), np.uint8)
  label = np.zeros((height, width), np.uint8)
  label[: height // 2] = 1
  label[:, : width // 4] = 2
  label[:, -10:] = VOID
  return image, label


def shows_text(picture, text, size=13):
  """Whether the text, drawn alone, occurs pixel for pixel in the picture."""
  font = ImageFont.load_default(size)
  left, top, right, bottom = map(int, font.getbbox(text, anchor='lm'))
  box = Image.new('RGB', (right - left, bottom - top), (255, 255, 255))
  place = (-left, -top)
  ImageDraw.Draw(box).text(place, text, (32, 32, 32), font, anchor='lm')
  # matchTemplate rounds, so only its best place is compared exactly.
  differences = cv2.matchTemplate(picture, np.asarray(box), cv2.TM_SQDIFF)
  y, x = np.unravel_index(differences.argmin(), differences.shape)
  found = picture[y : y + box.height, x : x + box.width]
  return np.array_equal(found, np.asarray(box))


def test_colorize_paints_classes_and_void():
  label = np.array([[0, 1], [4, VOID]])
  colors = visualize.colorize(label, PALETTE)
  assert colors.dtype == np.uint8
  assert colors.tolist() == [
    [[0, 0, 0], [200, 40, 40]],
    [[200, 200, 40], [224, 224, 192]],
  ]


@pytest.mark.parametrize('ignore_label', [-1, 0, 11])
def test_colorize_takes_any_ignore_label(ignore_label):
  label = np.array([[ignore_label, 2]], np.int32)
  colors = visualize.colorize(label, PALETTE, ignore_label)
  assert colors[0].tolist() == [[224, 224, 192], [40, 200, 40]]


@pytest.mark.parametrize('value', [5, 254, -1])
def test_a_label_that_is_no_class_is_named(value):
  label = np.array([[0, value]], np.int32)
  for function in (
    lambda: visualize.colorize(label, PALETTE),
    lambda: visualize.class_shares(label, 5),
    lambda: visualize.indexed_png(label, PALETTE),
  ):
    with pytest.raises(ValueError, match=f'label value {value} is neither'):
      function()


def test_class_shares_leave_void_out():
  label = np.array([[0, 0, 0, 2], [VOID, VOID, VOID, VOID]], np.uint8)
  shares = visualize.class_shares(label, 3)
  np.testing.assert_array_equal(shares, [0.75, 0, 0.25])


def test_class_shares_of_void_alone_are_zero():
  shares = visualize.class_shares(np.full((2, 3), VOID, np.uint8), 3)
  np.testing.assert_array_equal(shares, [0, 0, 0])


@pytest.mark.parametrize('classes', [2, 5, 256])
def test_indexed_png_keeps_mode_size_indices_and_colors(tmp_path, classes):
  generator = np.random.default_rng(classes)
  palette = generator.integers(0, 256, (classes, 3), np.uint8)
  label = generator.integers(0, min(classes, 255), (37, 53)).astype(np.int32)
  label[3:5] = VOID
  path = tmp_path / 'label.png'
  path.write_bytes(visualize.indexed_png(label, palette))
  with Image.open(path) as picture:
    assert (picture.mode, picture.size) == ('P', (53, 37))
    np.testing.assert_array_equal(np.asarray(picture), label)
    np.testing.assert_array_equal(
      np.asarray(picture.convert('RGB')), visualize.colorize(label, palette)
    )
  gray = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
  np.testing.assert_array_equal(gray, visualize.colorize(label, palette))


def test_indexed_png_refuses_an_ignore_label_beyond_a_byte():
  label = np.array([[0, 300]])
  with pytest.raises(ValueError, match='300'):
    visualize.indexed_png(label, PALETTE, 300)


def test_png_comes_back_as_it_was(tmp_path):
  image, _ = scene()
  visualize.save_png(str(tmp_path / 'image.png'), image)
  with Image.open(tmp_path / 'image.png') as picture:
    assert picture.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
  image, _ = scene()
  path = tmp_path / 'image.png'
  visualize.save_png(path, image)
  before = path.read_bytes()

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    visualize.save_png(path, 255 - image)
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ['image.png']


def test_overlay_mixes_image_and_color_inside_the_classes():
  image, label = scene()
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  assert picture.dtype == np.uint8
  for region, color in (
    (np.s_[1:40, 45:145], PALETTE[1]),
    (np.s_[50:85, 45:145], PALETTE[0]),
    (np.s_[1:85, 1:35], PALETTE[2]),
  ):
    expected = 0.5 * image[region] + 0.5 * color
    assert np.abs(picture[region] - expected).max() <= 0.501


def test_overlay_leaves_void_clear():
  image, label = scene()
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  np.testing.assert_array_equal(picture[:90, 150:160], image[:, 150:])


def test_overlay_draws_a_light_line_between_classes():
  image, label = scene()
  picture = visualize.overlay(0 * image, label, PALETTE, CLASSES)
  assert picture[44, 60:140].min() >= 150  # last row of class 1
  assert picture[43, 60:140, 1:].max() < 50
  assert picture[45, 60:140].max() == 0


def test_overlay_of_void_alone_is_the_image_without_legend():
  image, label = scene()
  picture = visualize.overlay(image, label * 0 + VOID, PALETTE, CLASSES)
  np.testing.assert_array_equal(picture, image)


@pytest.mark.parametrize('size', [(360, 480), (32, 48), (7, 9), (1, 1)])
def test_overlay_keeps_the_picture_in_its_size_above_the_legend(size):
  image = np.full((*size, 3), 100, np.uint8)
  label = np.zeros(size, np.uint8)
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  height, width = size
  assert picture.shape[0] > height
  assert picture.shape[1] >= width
  assert (picture[:height, :width] == 50).all()
  assert (picture[:height, width:] == 255).all()


def test_legend_names_each_class_that_occurs_with_its_share_and_color():
  image, label = scene(100, 500)
  label[:, :] = 0
  label[:, :100] = 1
  label[:2, 100:125] = 4
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  strip = picture[100:]
  for text in ('background 79.9%', 'circle 20.0%', 'jpg 0.1%'):
    assert shows_text(strip, text), text
  for absent in ('long_triangle', 'square'):
    assert not shows_text(strip, absent), absent
  for index, shown in ((0, True), (1, True), (2, False), (4, True)):
    swatch = (strip == PALETTE[index]).all(axis=-1).sum() >= 100
    assert swatch == shown
  order = [
    np.argwhere((strip == PALETTE[index]).all(axis=-1))[:, 1].min()
    for index in (0, 1, 4)
  ]
  assert order == sorted(order)


def test_tiny_share_is_not_shown_as_zero():
  image, label = scene(100, 500)
  label[:] = 0
  label[0, 0] = 1
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  assert shows_text(picture[100:], 'circle <0.1%')


def test_legend_wraps_to_more_rows_and_cuts_no_name():
  names = [f'a_rather_long_class_name_{index}' for index in range(21)]
  palette = np.random.default_rng(0).integers(0, 200, (21, 3), np.uint8)
  image = np.zeros((64, 210, 3), np.uint8)
  heights = []
  for shown in (1, 5, 21):
    label = np.tile(np.arange(210) * shown // 210, (64, 1))
    picture = visualize.overlay(image, label, palette, names)
    heights.append(picture.shape[0])
    for name in names[:shown]:
      assert shows_text(picture[64:], name), name
    assert (picture[64:, -1] == 255).all()
  assert heights[0] < heights[1] < heights[2]


def test_legend_text_grows_with_large_pictures():
  image = np.zeros((300, 1920, 3), np.uint8)
  label = np.zeros((300, 1920), np.uint8)
  picture = visualize.overlay(image, label, PALETTE, CLASSES)
  assert shows_text(picture[300:], 'background 100.0%', size=30)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'label': np.zeros((3, 4), np.uint8)}, 'one size'),
    ({'image': np.zeros((90, 160, 3))}, 'uint8'),
    ({'image': np.zeros((90, 160), np.uint8)}, r'\[H, W, 3\]'),
    ({'label': np.zeros((90, 160))}, 'integers'),
    ({'classes': CLASSES[:2]}, 'must be 5 names'),
  ],
)
def test_overlay_says_what_does_not_fit(changes, message):
  image, label = scene()
  given = {'image': image, 'label': label, 'classes': CLASSES} | changes
  with pytest.raises(ValueError, match=message):
    visualize.overlay(palette=PALETTE, **given)


def test_panel_rows_are_image_label_prediction():
  image, label = scene(20, 30)
  prediction = np.where(label == VOID, 0, label)
  sheet = visualize.panel(
    [image, image], [label, label], [prediction, label], PALETTE
  )
  assert sheet.shape == (2 * 20 + 4, 3 * 30 + 2 * 4, 3)
  painted = visualize.colorize(label, PALETTE)
  for top, found in ((0, prediction), (24, label)):
    row = sheet[top : top + 20]
    np.testing.assert_array_equal(row[:, :30], image)
    np.testing.assert_array_equal(row[:, 34:64], painted)
    np.testing.assert_array_equal(
      row[:, 68:], visualize.colorize(found, PALETTE)
    )
  assert (sheet[20:24] == 255).all()
  assert (sheet[:, 30:34] == 255).all()
  assert (sheet[5, 34 + 25] == visualize.VOID_COLOR).all()


def test_panel_without_labels_has_two_columns():
  image, label = scene(20, 30)
  sheet = visualize.panel([image], None, [label], PALETTE)
  assert sheet.shape == (20, 64, 3)
  np.testing.assert_array_equal(
    sheet[:, 34:], visualize.colorize(label, PALETTE)
  )


def test_panel_takes_images_of_different_size_and_whole_batches():
  large, small = scene(20, 30), scene(12, 14)
  sheet = visualize.panel(
    [large[0], small[0]], None, [large[1], small[1]], PALETTE
  )
  assert sheet.shape == (20 + 4 + 12, 30 + 4 + 30, 3)
  np.testing.assert_array_equal(sheet[24:, :14], small[0])
  assert (sheet[24:, 14:34] == 255).all()
  images, labels = np.stack([large[0]] * 3), np.stack([large[1]] * 3)
  assert visualize.panel(images, labels, labels, PALETTE).shape[0] == 68


def test_panel_with_names_and_classes_adds_titles_and_a_legend():
  image, label = scene(20, 30)
  words = {'classes': CLASSES, 'names': ['a', 'b'], 'mious': [0.4567, np.nan]}
  pair = [image] * 2, [label] * 2
  sheet = visualize.panel(*pair, pair[1], PALETTE, **words)
  titles = (
    'image a',
    'image b',
    'label',
    'prediction',
    'prediction, mIoU 45.7 %',
  )
  for text in (*titles, 'background', 'circle', 'long_triangle', 'void'):
    assert shows_text(sheet, text), text
  for text in ('square', 'mIoU nan'):  # absent, and not known
    assert not shows_text(sheet, text), text
  strip = visualize.legend([('label', None)], 30).shape[0]
  # All columns are as wide as the longest title.
  pitch = visualize.legend([(titles[-1], None)], 30).shape[1] + 4
  for top in (strip, 2 * strip + 20 + 4):
    row = sheet[top : top + 20]
    np.testing.assert_array_equal(row[:, :30], image)
    painted = visualize.colorize(label, PALETTE)
    np.testing.assert_array_equal(row[:, pitch : pitch + 30], painted)
  sheet = visualize.panel([image], None, [label], PALETTE, names=['c'])
  assert shows_text(sheet, 'image c') and shows_text(sheet, 'prediction')
  assert not shows_text(sheet, 'label')


def test_panel_shrinks_wide_pictures_below_titles():
  image, label = scene(20, 30)
  wide, labels = np.tile(image, (40, 60, 1)), np.tile(label, (40, 60))
  sheet = visualize.panel([wide], [labels], [labels], PALETTE, names=['a'])
  assert sheet.shape[1] == 3 * 640 + 2 * 4
  assert sheet.shape[0] < 800 * 640 / 1800 + 60
  colors = {tuple(c) for c in sheet[60:, 644:1284].reshape(-1, 3).tolist()}
  painted = visualize.colorize(label, PALETTE).reshape(-1, 3).tolist()
  assert colors <= {(255, 255, 255), *map(tuple, painted)}  # none in between


def test_panel_says_what_does_not_fit():
  image, label = scene(20, 30)
  with pytest.raises(ValueError, match=r'\[2, 1\]'):
    visualize.panel([image] * 2, None, [label], PALETTE)
  with pytest.raises(ValueError, match='at least one'):
    visualize.panel([], None, [], PALETTE)
  with pytest.raises(ValueError, match='one size'):
    visualize.panel([image], None, [label[1:]], PALETTE)


@few
@given(
  height=st.integers(1, 40),
  width=st.integers(1, 40),
  classes=st.integers(1, 255),
  seed=st.integers(0, 2**32),
)
def test_any_indexed_png_comes_back_with_its_colors(
  height, width, classes, seed
):
  generator = np.random.default_rng(seed)
  palette = generator.integers(0, 256, (classes, 3), np.uint8)
  label = generator.integers(0, classes, (height, width))
  label[generator.random(label.shape) < 0.2] = VOID
  data = visualize.indexed_png(label, palette)
  with Image.open(io.BytesIO(data)) as picture:
    np.testing.assert_array_equal(np.asarray(picture), label)
    colors = np.array(picture.getpalette()).reshape(-1, 3)
  np.testing.assert_array_equal(colors[:classes], palette)
  np.testing.assert_array_equal(open_label('x', data).pixels, label)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6])
def test_images_as_stored_are_shown_as_gray_or_by_three_bands(channels):
  deep = np.zeros((10, 100, channels), np.uint16)
  deep[:] = np.arange(1000).reshape(10, 100, 1) * (1 + np.arange(channels))
  shown = visualize.as_rgb(deep)
  assert shown.shape == (10, 100, 3) and shown.dtype == np.uint8
  low, high = np.percentile(np.arange(1000), (2, 98))
  expected = np.clip((np.arange(1000) - low) * 255 / (high - low), 0, 255)
  for i in range(3):  # a stretched band forgets its factor
    assert np.abs(shown[..., i].ravel() - expected).max() <= 0.5 + 1e-6
  shallow = (deep // 100).astype(np.uint8)
  bands = [0, 1, 2] if channels > 2 else [0, 0, 0]
  np.testing.assert_array_equal(visualize.as_rgb(shallow), shallow[..., bands])
