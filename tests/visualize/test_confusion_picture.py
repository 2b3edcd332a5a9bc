"""Colours at the cells of a confusion matrix."""

import numpy as np
import pytest

from deeplab_jax.visualize.confusion import confusion_picture

CELL = 44  # of few classes


def cells(picture, count, cell):
  """The colour at the upper left of each cell, [C, C, 3]."""
  start = picture.shape[0] - cell // 2 - count * cell
  places = start + 2 + cell * np.arange(count)
  return picture[np.ix_(places, places)].astype(int)


def test_rows_are_shares_of_the_true_class():
  confusion = np.array([[30, 10, 0], [0, 0, 0], [500, 0, 500]])
  picture = confusion_picture(confusion, ('a', 'some longer name', 'c'))
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
  picture = confusion_picture(np.eye(count, dtype=int), names)
  assert picture.shape[0] < 2100
  colors = cells(picture, count, cell)
  assert (colors[np.eye(count, dtype=bool)] == (8, 64, 129)).all()
  assert (colors[~np.eye(count, dtype=bool)] == 255).all()


def test_names_stand_before_rows_and_above_columns_alike():
  picture = confusion_picture(np.zeros((2, 2), int), ('wide name', 'x'))
  corner = picture.shape[0] - CELL // 2 - 2 * CELL
  rows, columns = picture[corner:, :corner], picture[:corner, corner:]
  dark = [(part < 128).any(-1) for part in (rows, columns)]
  assert all(part.any() for part in dark)
  # The long name of the first class takes more ink than that of the second.
  assert dark[0][:CELL, CELL:].sum() > dark[0][CELL : 2 * CELL, CELL:].sum()
  assert dark[1][CELL:, :CELL].sum() > dark[1][CELL:, CELL : 2 * CELL].sum()


def test_sizes_that_do_not_agree_are_shown():
  with pytest.raises(ValueError, match=r'\[2, 2\], got \[3, 3\]'):
    confusion_picture(np.zeros((3, 3), int), ('a', 'b'))
