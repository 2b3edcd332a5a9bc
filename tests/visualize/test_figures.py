"""The confusion matrix by its colors, sample pages by pixels and records."""

import numpy as np
import pytest

from deeplab_jax.data import datasets, images
from deeplab_jax.data.datasets import Tally
from deeplab_jax.visualize import figures

CELL = 44  # of few classes


def cells(picture, count, cell):
  """The color at the upper left of each cell, [C, C, 3]."""
  start = picture.shape[0] - cell // 2 - count * cell
  places = start + 2 + cell * np.arange(count)
  return picture[np.ix_(places, places)].astype(int)


def test_rows_are_shares_of_the_true_class():
  confusion = np.array([[30, 10, 0], [0, 0, 0], [500, 0, 500]])
  picture = figures.confusion_picture(confusion, ('a', 'some longer name', 'c'))
  assert picture.dtype == np.uint8 and picture.shape[0] == picture.shape[1]
  red = cells(picture, 3, CELL)[..., 0]
  full = 8  # the red of 100 %; white is 0 %
  shares = np.array([[0.75, 0.25, 0], [0.5, 0, 0.5]])
  expected = 255 + shares * (full - 255)
  np.testing.assert_allclose(red[[0, 2]], expected, atol=1)
  assert len(np.unique(red[1])) == 1 and 200 < red[1, 0] < 255  # no pixels


@pytest.mark.parametrize('count, cell', [(1, 44), (21, 44), (150, 12)])
def test_any_number_of_classes_finds_room(count, cell):
  names = [f'class {index}' for index in range(count)]
  picture = figures.confusion_picture(np.eye(count, dtype=int), names)
  assert picture.shape[0] < 2100
  colors = cells(picture, count, cell)
  assert (colors[np.eye(count, dtype=bool)] == (8, 64, 129)).all()
  assert (colors[~np.eye(count, dtype=bool)] == 255).all()


def test_names_stand_before_rows_and_above_columns_alike():
  picture = figures.confusion_picture(np.zeros((2, 2), int), ('wide name', 'x'))
  corner = picture.shape[0] - CELL // 2 - 2 * CELL
  rows, columns = picture[corner:, :corner], picture[:corner, corner:]
  dark = [(part < 128).any(-1) for part in (rows, columns)]
  assert all(part.any() for part in dark)
  # The long name of the first class takes more ink than that of the second.
  assert dark[0][:CELL, CELL:].sum() > dark[0][CELL : 2 * CELL, CELL:].sum()
  assert dark[1][CELL:, :CELL].sum() > dark[1][CELL:, CELL : 2 * CELL].sum()


def test_sizes_that_do_not_agree_are_shown():
  with pytest.raises(ValueError, match=r'\[2, 2\], got \[3, 3\]'):
    figures.confusion_picture(np.zeros((3, 3), int), ('a', 'b'))


class Source:
  """Records in memory that remember whose image was wanted."""

  def __init__(self, labels):
    self.labels = labels
    self.shown = []

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    source, label = self, self.labels[index]

    class Record(dict):
      def __getitem__(self, key):
        if key == 'image':
          source.shown.append(index)
        return super().__getitem__(key)

    # The red tells the record.
    image = np.full((*label.shape, 3), (40 + index % 200, 250, 250), np.uint8)
    return Record(
      image=images.encode_image(image),
      label=images.encode_label(label),
      name=f'name {index}'.encode(),
    )


def draw(labels, num_classes):
  """Returns the page, and the record numbers of its samples."""
  info = datasets.DatasetInfo(
    'made',
    [f'class {index}' for index in range(num_classes)],
    datasets.voc_palette(num_classes),
  )
  tally = Tally(num_classes, 255)
  for label in labels:
    tally.add(label)
  source = Source(labels)
  return figures.sample_page(source, info, tally, 'made'), source.shown


def squares(sides, value=1, size=(60, 80)):
  """A label for each side: a square of class `value` on ground."""
  labels = []
  for side in sides:
    label = np.zeros(size, np.uint8)
    label[:side, :side] = value
    labels.append(label)
  return labels


def colors(page):
  packed = np.unique(page.astype(np.int32) @ (1 << 16, 1 << 8, 1)).tolist()
  return {(color >> 16, color >> 8 & 255, color & 255) for color in packed}


def test_rare_class_is_seen_where_it_is():
  labels = squares([30] * 400)
  labels[333][50:, 70:] = 2
  page, shown = draw(labels, 4)
  assert 333 in shown
  assert {(40 + 333 % 200, 250, 250), (0, 128, 0)} <= colors(page)


def test_samples_go_from_the_most_of_a_class_to_the_median():
  labels = squares([0] * 12 + [10, 50, 20, 40, 30])
  _, shown = draw(labels, 2)
  # Class 0 has what is left: the rarer class chooses first.
  assert shown[3:] == [13, 15, 16]
  assert len(set(shown)) == 6


def test_fewer_samples_than_wanted_are_all_shown():
  labels = squares([0] * 3) + squares([20, 30])
  _, shown = draw(labels, 2)
  assert shown[-2:] == [4, 3]


def test_same_records_give_the_same_page():
  labels = squares(range(1, 50))
  one, other = draw(labels, 3), draw(labels, 3)
  np.testing.assert_array_equal(one[0], other[0])
  assert one[1] == other[1]


def test_label_stands_beside_its_image_undistorted():
  label = np.zeros((60, 120), np.uint8)
  label[:, 60:] = 1
  page, _ = draw([label], 2)
  ground = (page == (0, 0, 0)).all(-1)
  right = (page == (128, 0, 0)).all(-1)
  image = (page == (40, 250, 250)).all(-1)
  # Rows that cross a sample, and not the captions.
  row = np.flatnonzero(image.any(1))[0] + 5
  x = np.flatnonzero(image[row])
  assert x.size == 300 == np.ptp(x) + 1
  assert np.flatnonzero(ground[row])[0] == x[-1] + 5
  assert ground[row].sum() == right[row].sum() == 150
  assert image[:, x[0]].sum() == 2 * 150  # a sample of each class


def test_page_of_void_alone_has_a_legend():
  page, shown = draw([np.full((60, 80), 255, np.uint8)], 2)
  assert not shown and {(128, 0, 0), (224, 224, 192)} <= colors(page)


@pytest.mark.parametrize(
  'num_classes, size',
  [
    (1, (60, 80)),
    (12, (80, 60)),
    (21, (20, 200)),
    (31, (300, 30)),
    (255, (60, 80)),
  ],
)
def test_page_is_no_larger_than_a_person_can_look_at(num_classes, size):
  labels = [np.full(size, index, np.uint8) for index in range(num_classes)]
  page, shown = draw(labels, num_classes)
  assert sorted(shown) == list(range(num_classes))
  assert page.shape[0] <= 4000 and page.shape[1] <= 2000


@pytest.mark.parametrize('box', [(31, 40), (60, 80), (150, 200)])
def test_no_color_appears_between_those_of_two_classes(box):
  label = 2 * np.random.default_rng(0).integers(0, 2, (60, 80))
  record = Source([label.astype(np.uint8)])[0]
  info = datasets.DatasetInfo('made', ['a', 'b', 'c'], datasets.voc_palette(3))
  tile = figures._tile(record, 2, info, box)
  seen = colors(tile[figures._CAPTION :])
  image, gap = (40, 250, 250), (255, 255, 255)
  assert seen == {image, gap, *map(tuple, info.palette[[0, 2]].tolist())}
