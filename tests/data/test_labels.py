"""What label files mean, against values written out by hand."""

import types

import numpy as np
import pytest

from deeplab_jax.data import label_files, labels
from deeplab_jax.runtime.errors import UserError

COLORED = ['ground 0 0 0', 'red car 200 0 0', 'void 9 9 9', 'tree 0 200 0']


def file(pixels, palette=None):
  pixels = np.array(pixels, np.uint8)
  palette = None if palette is None else np.array(palette, np.uint8)
  return label_files.LabelFile('a.png', pixels, palette, turned=False)


def classes_of(meaning, label):
  return meaning.to_classes(meaning.label_values(label)).tolist()


def test_lines_without_colors_are_names_whatever_they_end_in():
  lines = ['a', 'route 66', 'b 1 2', 'void']
  assert labels.parse_classes(lines) == (tuple(lines), None)
  assert labels.Meaning(lines).void_values == {255}


def test_lines_with_colors_are_split():
  names, colors = labels.parse_classes(COLORED)
  assert names == ('ground', 'red car', 'void', 'tree')
  assert colors.tolist() == [
    [0, 0, 0],
    [200, 0, 0],
    [9, 9, 9],
    [0, 200, 0],
  ]
  assert labels.Meaning(COLORED).void_values == {2, 255}


@pytest.mark.parametrize(
  'lines, words',
  [
    (['a 1 2 3', 'b'], "'b' has no color"),
    (['a 1 2 3', 'b 1 2 256'], "color of 'b', (1, 2, 256), is not in 0..255"),
    (['a 1 2 3', 'b 1 2 3'], "'a' and 'b' have one color, (1, 2, 3)"),
  ],
)
def test_colors_that_cannot_be_are_named(lines, words):
  with pytest.raises(ValueError) as caught:
    labels.parse_classes(lines)
  assert words in str(caught.value)


def test_label_map_is_read():
  assert labels.parse_label_map('', 255) == {}
  assert labels.parse_label_map('255:1', 255) == {255: 1}
  text = ' 0:void, 1:0,2 : 0'
  assert labels.parse_label_map(text, 200) == {0: 200, 1: 0, 2: 0}


@pytest.mark.parametrize(
  'text, word',
  [
    ('255', "'255'"),
    ('256:1', "'256:1'"),
    ('-1:1', "'-1:1'"),
    ('1:box', "'1:box'"),
    ('9' * 9999 + ':1', "9999:1'"),
    ('1:0,1:2', 'value 1 stands twice'),
  ],
)
def test_wrong_label_map_is_named(text, word):
  with pytest.raises(UserError) as caught:
    labels.parse_label_map(text, 255)
  assert str(caught.value).startswith('config.data.label_map: ')
  assert word in str(caught.value)


def test_label_map_to_no_class_is_refused():
  listed = ('a', 'b')
  with pytest.raises(UserError, match=r'5:2 names class 2, and .* 2 lines'):
    labels.Meaning(listed, label_map='5:2')
  labels.Meaning(listed, ignore_label=7, label_map='5:7')


@pytest.mark.parametrize(
  'ignore_label, classes, values, stored',
  [
    (0, ('b', 'c', 'd'), (1, 2, 3), [255, 0, 1, 2]),
    (2, ('a', 'b', 'd'), (0, 1, 3), [0, 1, 255, 2]),
    (3, ('a', 'b', 'c'), (0, 1, 2), [0, 1, 2, 255]),
    (4, ('a', 'b', 'c', 'd'), (0, 1, 2, 3), [0, 1, 2, 3]),
  ],
)
def test_line_of_the_ignore_label_is_no_class(
  ignore_label, classes, values, stored
):
  meaning = labels.Meaning(tuple('abcd'), ignore_label)
  assert meaning.classes == classes and meaning.values == values
  assert meaning.stored_ignore_label == (4 if ignore_label == 4 else 255)
  assert classes_of(meaning, file([[0, 1, 2, 3]])) == [stored]


def test_256_lines_of_which_one_is_void():
  lines = tuple(f'c{i}' for i in range(256))
  meaning = labels.Meaning(lines, 255)
  assert len(meaning.classes) == 255
  every = np.arange(256, dtype=np.uint8)[None]
  assert classes_of(meaning, file(every)) == every.tolist()


def test_classes_that_are_all_void_are_refused():
  with pytest.raises(UserError, match='no class besides void'):
    labels.Meaning(('a',), 0)


def test_label_map_comes_before_the_ignore_label():
  listed = ('ground', 'box')
  meaning = labels.Meaning(listed, 255, '255:1,7:void')
  assert classes_of(meaning, file([[0, 255, 7, 1]])) == [[0, 1, 255, 1]]


def test_colors_are_read_by_value_and_void_is_no_class():
  meaning = labels.Meaning(COLORED)
  assert meaning.classes == ('ground', 'red car', 'tree')
  assert meaning.colors.tolist() == [[0, 0, 0], [200, 0, 0], [0, 200, 0]]
  rgb = file([[[0, 200, 0], [9, 9, 9], [200, 0, 0], [0, 0, 0]]])
  assert meaning.label_values(rgb).tolist() == [[3, 2, 1, 0]]
  assert classes_of(meaning, rgb) == [[2, 255, 1, 0]]
  # gray labels go by the number of the line
  assert classes_of(meaning, file([[0, 1, 2, 3, 255]])) == [[0, 1, 255, 2, 255]]


def test_palette_labels_are_read_by_color_if_classes_have_colors():
  meaning = labels.Meaning(COLORED)
  palette = [[0, 200, 0], [0, 0, 0], [200, 0, 0]]
  label = file([[0, 1, 2, 255]], palette)  # index 255 is void in any color
  assert classes_of(meaning, label) == [[2, 0, 1, 255]]
  assert meaning.used_colors(label) == []


def test_index_of_a_void_line_with_a_color_goes_by_color():
  listed = ['unlabelled 0 0 0', 'a 1 1 1', 'b 2 2 2']
  meaning = labels.Meaning(listed, 0)
  label = file([[0, 1, 2]], [[2, 2, 2], [0, 0, 0], [1, 1, 1]])
  assert classes_of(meaning, label) == [[1, 255, 0]]


def test_index_beyond_the_palette_has_no_color():
  meaning = labels.Meaning(COLORED)
  with pytest.raises(UserError, match=r'index 2 has no color'):
    meaning.label_values(file([[0, 2]], [[0, 0, 0], [200, 0, 0]]))
  all_void = file([[255, 255]], [[0, 0, 0]])
  assert classes_of(meaning, all_void) == [[255, 255]]


def test_color_of_no_class_is_named_with_its_pixels():
  meaning = labels.Meaning(COLORED)
  rgb = file([[[0, 200, 1], [0, 200, 1], [1, 2, 3], [0, 0, 0]]])
  with pytest.raises(UserError) as caught:
    meaning.label_values(rgb)
  message = str(caught.value)
  assert message.startswith('a.png: the color 0 200 1 (2 pixels) is none of')
  with pytest.raises(UserError, match=r'the color 5 5 5 \(1 pixels\)'):
    meaning.label_values(file([[0]], [[5, 5, 5]]))


def test_colors_without_colors_of_classes_are_refused_with_the_remedy():
  meaning = labels.Meaning(('a',))
  with pytest.raises(UserError, match=r'mode is RGB.*classes\.txt'):
    meaning.label_values(file([[[0, 0, 0]]]))


def test_palettes_may_differ_where_they_are_not_used_or_void():
  meaning = labels.Meaning(('a', 'b', 'c'))
  first = file([[0, 1, 255]], [[1, 1, 1], [2, 2, 2], [3, 3, 3]])
  second = file(
    [[0, 2, 255]], [[1, 1, 1], [9, 9, 9], [4, 4, 4]] + [[5] * 3] * 253
  )
  palettes = labels.Palettes()
  palettes.add(meaning.used_colors(first))
  palettes.add(meaning.used_colors(second))
  assert list(palettes.values()) == [
    [0, 1, 1, 1, 'a.png'],
    [1, 2, 2, 2, 'a.png'],
    [2, 4, 4, 4, 'a.png'],
  ]


def test_palettes_that_differ_are_refused_naming_both_files():
  palettes = labels.Palettes()
  palettes.add([[1, 2, 2, 2, 'one'], [0, 0, 0, 0, 'one']])
  with pytest.raises(UserError) as caught:
    palettes.add([[0, 0, 0, 0, 'two'], [1, 7, 8, 9, 'two']])
  assert str(caught.value).startswith(
    'two: index 1 has the color 7 8 9, but in one 2 2 2'
  )


@pytest.mark.parametrize(
  'label_map, expected',
  [
    ('', (0, 1, 2)),
    ('255:1', (0, 255, 2)),
    ('5:0,6:0', (5, 1, 2)),  # the first stands for all
    ('1:0,2:1,3:2', (1, 2, 3)),
    ('0:void,2:0,1:0', (2, 3, 4)),  # b and c have no value left
  ],
)
def test_each_class_has_a_value_of_its_own_in_predictions(label_map, expected):
  listed = ('a', 'b', 'c')
  meaning = labels.Meaning(listed, label_map=label_map)
  assert meaning.file_values() == expected


def test_a_label_map_beside_colors_is_for_gray_labels():
  listed = ['a 0 0 0', 'b 255 0 0']
  meaning = labels.Meaning(listed, label_map='255:1')
  label = types.SimpleNamespace(
    path='x.png',
    pixels=np.uint8([[0, 255]]),
    palette=None,
    indices=lambda: label.pixels,
  )
  assert meaning.label_values(label).tolist() == [[0, 1]]
  label.palette = np.zeros((256, 3), np.uint8)
  with pytest.raises(UserError, match=r'x\.png: .*label_map maps values, but'):
    meaning.label_values(label)


def test_void_in_the_color_of_a_class_is_refused():
  listed = ['a 0 0 0', 'b 255 0 0']
  palette = np.zeros((256, 3), np.uint8)
  palette[1] = 255, 0, 0

  def label(*pixels):
    return types.SimpleNamespace(
      path='x.png', pixels=np.uint8([pixels]), palette=palette
    )

  meaning = labels.Meaning(listed)
  assert meaning.label_values(label(0, 1)).tolist() == [[0, 1]]
  with pytest.raises(
    UserError, match=r"x\.png: index 255 is void, .* class 'a'"
  ):
    meaning.label_values(label(0, 255))
  palette[255] = 9, 9, 9
  assert meaning.label_values(label(0, 255)).tolist() == [[0, 255]]


@pytest.mark.parametrize('name', ['void', 'Void', 'VOID'])
def test_a_line_of_voids_color_is_no_class(name):
  listed = ['a 0 0 0', f'{name} 9 9 9', 'b 255 0 0']
  assert labels.Meaning(listed).classes == ('a', 'b')


def test_unknown_classes_leave_values_as_they_are():
  meaning = labels.Meaning((), 0, '9:1')
  label = types.SimpleNamespace(
    path='a', pixels=None, palette=None, indices=lambda: np.uint8([[0, 9, 7]])
  )
  assert meaning.label_values(label).tolist() == [[0, 1, 7]]
  assert meaning.classes == ()
