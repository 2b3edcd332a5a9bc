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
    ('65536:1', "'65536:1'"),
    ('1:256', "'1:256'"),
    ('1-3:0-3', "'1-3:0-3'"),
    ('3-1:void', "'3-1:void'"),
    ('1:0-1', "'1:0-1'"),
    ('#ff00:1', "'#ff00:1'"),
    ('#FF0000:1,#ff0000:0', 'value #ff0000 stands twice'),
    ('other:0,other:1', 'value other stands twice'),
    ('1-3:0,2:1', 'value 2 stands twice'),
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


def test_label_map_of_ranges_and_colors_is_read():
  found = labels.parse_label_map('0:void,1-3:0-2,9-10:1,300:2,Other:Void', 255)
  assert found == {0: 255, 1: 0, 2: 1, 3: 2, 9: 1, 10: 1, 300: 2, 'other': 255}
  found = labels.parse_label_map('#FF0001:1, #00ff00 : void', 7)
  assert found == {(255, 0, 1): 1, (0, 255, 0): 7}


def test_1_based_values_of_a_long_list_shift():
  meaning = labels.Meaning(
    [f'c{i}' for i in range(150)], 255, '0:void,1-150:0-149'
  )
  every = np.arange(151)[None]
  assert classes_of(meaning, file(every)) == [[255, *range(150)]]
  assert meaning.file_values() == tuple(range(1, 151))


def test_label_map_reads_values_of_16_bits():
  deep = label_files.LabelFile(
    'a.png', np.array([[0, 1, 1000, 65535]], np.uint16), None, turned=False
  )
  meaning = labels.Meaning(('a', 'b'), label_map='1000:1,65535:void')
  assert classes_of(meaning, deep) == [[0, 1, 1, 255]]
  assert meaning.file_values() == (0, 1)
  for text in ('', '1000:1'):
    with pytest.raises(UserError, match=r'a\.png: label value (1000|65535)'):
      labels.Meaning(('a', 'b'), label_map=text).label_values(deep)


def test_colors_in_the_label_map_read_rgb_and_palettes_alike():
  meaning = labels.Meaning(
    ('a', 'b'), label_map='#0000ff:1,#ff0000:0,#00ff00:void'
  )
  rgb = file([[[255, 0, 0], [0, 0, 255], [0, 255, 0]]])
  assert classes_of(meaning, rgb) == [[0, 1, 255]]
  palette = [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
  label = file([[2, 0, 1, 255]], palette)
  assert classes_of(meaning, label) == [[0, 1, 255, 255]]
  assert meaning.used_colors(label) == []
  assert meaning.colors.tolist() == [[255, 0, 0], [0, 0, 255]]
  assert classes_of(meaning, file([[0, 1]])) == [[0, 1]]  # gray, by value
  with pytest.raises(
    UserError, match=r'none of those in config\.data\.label_map'
  ):
    meaning.label_values(file([[[1, 0, 0]]]))


def test_the_label_map_goes_before_the_colors_in_classes_txt():
  meaning = labels.Meaning(COLORED, 255, '#c80000:0,#050505:void')
  rgb = file([[[200, 0, 0], [5, 5, 5], [0, 200, 0]]])
  assert meaning.label_values(rgb).tolist() == [[0, 255, 3]]


def test_other_stands_for_all_that_is_not_named():
  gray = labels.Meaning(('a', 'b'), label_map='0:0,255:1,other:void')
  assert classes_of(gray, file([[0, 1, 128, 255]])) == [[0, 255, 255, 1]]
  colors = labels.Meaning(
    ('a', 'b'), label_map='#000000:0,#ff0000:1,other:void'
  )
  rgb = file([[[0, 0, 0], [255, 0, 0], [127, 0, 0]]])
  assert classes_of(colors, rgb) == [[0, 1, 255]]
  listed = labels.Meaning(COLORED, label_map='other:0')
  assert listed.label_values(file([[[1, 2, 3], [0, 200, 0]]])).tolist() == [
    [0, 3]
  ]


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
    meaning.label_values(file([[[0, 0, 9]]]))
  assert meaning.label_values(file([[[0, 0, 0], [3, 3, 3]]])).tolist() == [
    [0, 3]
  ]


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


def test_a_class_that_a_label_map_leaves_no_value_is_named():
  listed = ('a', 'b', 'c')
  meaning = labels.Meaning(listed, label_map='0-127:0,128-255:1')
  with pytest.raises(UserError, match=r'label_map .* the class .c.; give it'):
    meaning.file_values()


def test_a_label_map_beside_colors_is_for_gray_labels():
  listed = ['a 0 0 0', 'b 255 0 0']
  meaning = labels.Meaning(listed, label_map='255:1')
  assert meaning.label_values(file([[0, 255]])).tolist() == [[0, 1]]
  label = file([[0, 255]], np.zeros((256, 3)))
  with pytest.raises(UserError, match=r'a\.png: .*label_map maps values, but'):
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
  assert meaning.label_values(file([[0, 9, 7]])).tolist() == [[0, 1, 7]]
  assert meaning.classes == ()
