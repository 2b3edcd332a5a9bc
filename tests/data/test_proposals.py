"""What is proposed for labels that do not fit, from scenes of known classes.

A scene has the classes 0, 1 and 2; each case stores it in another way. Read
with what is proposed, its labels must be those of the scene.
"""

import io
import re

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import datasets, labels, proposals, survey
from deeplab_jax.data.label_files import open_label
from deeplab_jax.data.records import Item

COLORS = np.array([[60, 120, 60], [220, 60, 60], [60, 60, 220]], np.uint8)
NAMES = 'bg', 'box', 'disc'
VOID = 255


def scene(index, classes=3):
  """A label uint8 [40, 60]; class 0 has most pixels, then class 1."""
  label = np.zeros((40, 60), np.uint8)
  label[5:25, 5 + index : 25] = 1
  if classes > 2:
    label[20 : 30 + index % 3, 30:45] = 2
  return label


def with_void(label):
  return np.where(np.arange(40)[:, None] < 3, VOID, label)


def palette(label, colors):
  image = Image.fromarray(label.astype(np.uint8))
  image.putpalette(np.resize(np.uint8(colors), (256, 3)).tobytes())
  return image


def write(folder, images):
  items = []
  for index, image in enumerate(images):
    if isinstance(image, np.ndarray):
      image = Image.fromarray(image)
    path = folder / f'{index}.png'
    image.save(path)
    items.append(Item(str(index), path, path))
  return {'train': items[:3], 'val': items[3:]}


def proposed(folder, store, names=NAMES, ignore_label=VOID):
  """The proposal for four scenes, each as `store(index)`."""
  listed = write(folder, [store(index) for index in range(4)])
  return listed, proposals.propose(listed, names, ignore_label)


def read(listed, proposal, names=NAMES, ignore_label=VOID):
  lines = (*names, *proposal.new)
  meaning = labels.Meaning(lines, ignore_label, proposal.label_map)
  items = [*listed['train'], *listed['val']]
  return [
    meaning.to_classes(meaning.label_values(open_label(item.label)))
    for item in items
  ]


def as_table(*values):
  """Stores class i as `values[i]`, gray or RGB."""
  table = np.array(values)
  table = table.astype(np.uint16 if table.max() > 255 else np.uint8)
  return lambda index: table[scene(index, len(values))]


def as_void_table(void, *values):
  """The same where the first rows are void."""
  table = np.array([*values, void])
  table = table.astype(np.uint16 if table.max() > 255 else np.uint8)
  count = len(values)
  return lambda i: table[np.minimum(with_void(scene(i, count)), count)]


def shuffled(index):
  order = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1]][index]
  return palette(np.argsort(order)[scene(index)], COLORS[order])


def one_odd(index):
  order = [0, 2, 1] if index == 1 else [0, 1, 2]
  return palette(np.argsort(order)[scene(index)], COLORS[order])


BINARY = {
  'masks of 0 and 255': (as_table(0, 255), '255:1'),
  'of 0 and 128': (as_table(0, 128), '128:1'),
  'of 16 bits': (as_table(0, 65535), '65535:1'),
  'gray as RGB': (as_table([0] * 3, [255] * 3), '255:1'),
  'gray as RGBA': (as_table([0] * 3 + [9], [255] * 3 + [9]), '255:1'),
  'a palette': (
    lambda i: palette(255 * scene(i, 2), [[0] * 3, [9] * 3]),
    '255:1',
  ),
  'white, and gray is void': (as_void_table(128, 0, 255), '128:void,255:1'),
  'of 0 and 15, void 255': (as_void_table(255, 0, 15), '15:1'),
  'another split': (
    lambda i: scene(i, 2) * np.uint8([255, 1][i == 3]),
    '255:1',
  ),
}
CASES = {
  '1-based': (as_table(1, 2, 3), '0:void,1-3:0-2'),
  '1-based, void 255': (as_void_table(255, 1, 2, 3), '0:void,1-3:0-2'),
  '0 is void': (as_void_table(0, 1, 2, 3), '0:void,1-3:0-2'),
  '-1 is void': (as_void_table(65535, 0, 1, 2), '65535:void'),
  'levels': (as_table(0, 127, 255), '127:1,255:2'),
  'levels of some tool': (as_table(38, 75, 113), '38:0,75:1,113:2'),
  'levels of some tool, void 255': (
    as_void_table(255, 38, 75, 113),
    '38:0,75:1,113:2',
  ),
  'levels of 16 bits': (as_table(0, 1000, 2000), '1000:1,2000:2'),
  'RGB levels': (as_table([0] * 3, [127] * 3, [255] * 3), '127:1,255:2'),
  'colors': (as_table(*COLORS), '#3c783c:0,#dc3c3c:1,#3c3cdc:2'),
  'black first': (as_table([9] * 3, [1, 0, 0], [0] * 3), None),
  'void is black': (
    as_void_table([0] * 3, *COLORS),
    '#3c783c:0,#dc3c3c:1,#3c3cdc:2,#000000:void',
  ),
  'void of VOC': (
    as_void_table([224, 224, 192], *COLORS),
    '#3c783c:0,#dc3c3c:1,#3c3cdc:2,#e0e0c0:void',
  ),
  'colors of VOC': (
    as_table([0] * 3, [0, 128, 0], [128, 0, 0]),
    '#000000:0,#800000:1,#008000:2',
  ),
  'palettes differ': (shuffled, '#3c783c:0,#dc3c3c:1,#3c3cdc:2'),
  'one palette differs': (one_odd, '#3c783c:0,#dc3c3c:1,#3c3cdc:2'),
  'palettes and RGB': (
    lambda i: COLORS[scene(i)] if i == 3 else palette(scene(i), COLORS),
    '#3c783c:0,#dc3c3c:1,#3c3cdc:2',
  ),
}


@pytest.mark.parametrize('case', [*BINARY, *CASES])
def test_labels_read_as_proposed_are_those_of_the_scene(tmp_path, case):
  count = 2 if case in BINARY else 3
  store, text = {**BINARY, **CASES}[case]
  listed, proposal = proposed(tmp_path, store, NAMES[:count])
  if text is None:  # classes go by pixels, except black
    assert proposal.label_map.startswith('#000000:0,')
    return
  assert str(proposal).endswith(f': --config.data.label_map={text}')
  found = read(listed, proposal, NAMES[:count])
  for index, label in enumerate(found):
    expected = scene(index, count)
    if 'void' in case:
      expected = with_void(expected)
    if case == 'colors of VOC':  # its order is known, and not that of pixels
      expected = np.array([0, 2, 1])[expected]
    np.testing.assert_array_equal(label, expected)


def test_a_long_list_of_1_based_classes_stays_short(tmp_path):
  every = np.arange(1, 151, dtype=np.uint8).repeat(8).reshape(30, 40)
  names = [f'c{i}' for i in range(150)]
  _, proposal = proposed(tmp_path, lambda _: every, names)
  assert proposal.label_map == '0:void,1-150:0-149'


def test_values_without_names_get_lines_too(tmp_path):
  for store, text, count in (
    (as_table(0, 1, 2), '', 3),
    (as_table(0, 255), '255:1', 2),
    (as_table(1, 2, 3), '0:void,1-3:0-2', 3),
    (as_table(0, 127, 255), '127:1,255:2', 3),
    (as_table(*COLORS), '#3c783c:0,#dc3c3c:1,#3c3cdc:2', 3),
  ):
    _, proposal = proposed(tmp_path, store, ())
    assert proposal.label_map == text
    assert proposal.new == ('class0', 'class1', 'class2')[:count]
  _, proposal = proposed(tmp_path, as_table(0, 255), ('one',))
  assert (proposal.label_map, proposal.new) == ('255:1', ('class1',))


def test_the_ignore_label_stays_void(tmp_path):
  listed, proposal = proposed(tmp_path, as_void_table(9, 1, 2, 3), NAMES, 9)
  assert proposal.label_map == '0:void,1-3:0-2'
  assert (read(listed, proposal, NAMES, 9)[0][:3] == 9).all()


@pytest.mark.parametrize('value, text', [(0, '255:1'), (1, '255:0')])
@pytest.mark.parametrize('names', [NAMES, NAMES[:2]])
def test_what_is_proposed_for_one_value_and_void_is_what_the_survey_says(
  tmp_path, value, text, names
):
  _, proposal = proposed(tmp_path, as_table(value, VOID), names)
  assert proposal.label_map == text
  tally = datasets.Tally(len(names), VOID)
  tally.class_pixels[value] = tally.void_pixels = 9
  info = labels.Meaning(names, VOID)
  found = survey.label_findings(info, {'train': tally}, 'train')
  settings = re.findall(r'label_map=([\d:,]*\d)', f'{found} {proposal}')
  assert set(settings) == {text}


def test_no_class_of_a_split_becomes_void(tmp_path):
  # 0 is a class in train, and does not occur in val.
  _, proposal = proposed(tmp_path, lambda i: scene(i) + np.uint8(i == 3))
  assert proposal is None

  def store(index):
    label = np.where(np.arange(40)[:, None] < 3, 0, scene(index) + 1)
    return scene(index) if index == 3 else label.astype(np.uint8)

  # 0 is void in train, and val alone does not tell.
  _, proposal = proposed(tmp_path, store)
  assert proposal.label_map == '0:void,1-3:0-2'


def test_rare_values_that_are_no_class_become_void(tmp_path):
  def stray(index):
    label = scene(index)
    label[0, :3] = 7
    return label

  _, proposal = proposed(tmp_path, stray)
  assert proposal.label_map == '7:void' and 'rare' in proposal.reason


@pytest.mark.parametrize(
  'values, stray, text',
  [
    ((0, 255), 128, '128:void,255:1'),
    ((0, 255), 254, '254:void,255:1'),
    ((0, 127, 255), 64, '64:void,127:1,255:2'),
    ((0, 127, 255), 100, '100:void,127:1,255:2'),
  ],
)
def test_a_gray_pixel_leaves_white_a_class(tmp_path, values, stray, text):
  def store(index):
    label = as_table(*values)(index)
    label[0, 0] = stray if index == 1 else 0
    return label

  _, proposal = proposed(tmp_path, store, NAMES[: len(values)])
  assert proposal.label_map == text


def test_what_stays_void_is_said_if_a_class_has_fewer_pixels(tmp_path):
  def store(index):
    label = as_table(0, 255)(index)
    label[0, 0] = 3
    return label

  _, proposal = proposed(tmp_path, store, NAMES[:2])
  assert str(proposal) == (
    'all labels are 0, 3 or 255; in ascending order; 255 stays void, and is'
    ' more frequent than 3: --config.data.label_map=3:1'
  )


BLACK, GRAY, WHITE, RED, GREEN = ([0] * 3, [128] * 3, [255] * 3, *COLORS[:2])


@pytest.mark.parametrize(
  'classes, void',
  [
    ([BLACK, RED, GREEN], COLORS[2]),
    ([GRAY, RED, GREEN], BLACK),  # as CamVid has the sky
    ([WHITE, RED, GREEN], BLACK),
    ([RED, GRAY, GREEN], BLACK),
    ([BLACK, RED, GREEN], WHITE),
  ],
)
def test_the_most_frequent_color_is_a_class_and_of_grays_the_rarest_is_void(
  tmp_path, classes, void
):
  table = np.uint8([*classes, void])
  top = np.arange(40)[:, None] < 1
  listed, proposal = proposed(
    tmp_path, lambda index: table[np.where(top, 3, scene(index))]
  )
  for index, label in enumerate(read(listed, proposal)):
    np.testing.assert_array_equal(label, np.where(top, VOID, scene(index)))


@pytest.mark.parametrize('colors', [np.repeat([[0], [255]], 3, 1), COLORS[:2]])
def test_smooth_edges_become_void(tmp_path, colors):
  def smooth(index):
    y, x = np.mgrid[:160, :240]
    large = (y + 0.6 * x + 3 * index > 150).astype(int)
    image = Image.fromarray(np.uint8(colors)[large])
    return image.resize((60, 40), Image.Resampling.BOX)

  listed, proposal = proposed(tmp_path, smooth, NAMES[:2])
  assert proposal.label_map.endswith(',other:void')
  label = read(listed, proposal, NAMES[:2])[0]
  y, x = np.mgrid[:40, :60] * 4 + 1.5
  expected = (y + 0.6 * x > 150).astype(int)
  known = label != VOID
  # in the order of pixels, which need not be that of the classes
  swapped = label[0, 0] == 1
  np.testing.assert_array_equal(label[known], (expected ^ swapped)[known])
  assert 0.9 < known.mean() < 1


@pytest.mark.parametrize(
  'store',
  [as_table(0, 127, 255), as_table(38, 75, 113), as_table(*COLORS)],
)
def test_labels_that_were_jpegs_get_no_proposal(tmp_path, store):
  def damaged(index):
    Image.fromarray(store(index)).save(file := io.BytesIO(), 'JPEG', quality=85)
    return Image.open(file).copy()

  listed, proposal = proposed(tmp_path, damaged)
  assert proposal is None
  for item in listed['train']:  # in a file of that name, too
    Image.open(item.label).save(item.label, 'JPEG')
  assert proposals.propose({'train': listed['train']}, NAMES, VOID) is None


def test_values_above_the_classes_in_every_file_are_those_of_jpegs(tmp_path):
  def stray(index):
    label = scene(index)
    label[0, :3] = 3
    return label

  assert proposed(tmp_path, stray)[1] is None


def test_photographs_and_sound_labels_get_no_proposal(tmp_path):
  rng = np.random.default_rng(0)
  for store in (
    lambda _: rng.integers(0, 256, (40, 60, 3), np.uint8),
    lambda _: rng.integers(0, 256, (40, 60), np.uint8),
    scene,
  ):
    assert proposed(tmp_path, store)[1] is None


def test_colors_of_classes_txt_are_known_and_another_one_is_void(tmp_path):
  lines = 'bg 60 120 60', 'box 220 60 60', 'disc 60 60 220'
  _, proposal = proposed(tmp_path, as_void_table([0] * 3, *COLORS), lines)
  assert proposal.label_map == '#000000:void'
  assert proposal.table == ('#000000  void  720 pixels, 7.50%',)


def test_a_color_that_classes_txt_mistypes_is_that_of_the_unused_class(
  tmp_path,
):
  lines = 'bg 60 120 60', 'box 220 60 60', 'disc 60 60 200'
  listed, proposal = proposed(tmp_path, as_table(*COLORS), lines)
  assert str(proposal) == (
    '#3c3cdc is taken for disc, whose color in classes.txt no label has:'
    ' --config.data.label_map=#3c3cdc:2'
  )
  for index, label in enumerate(read(listed, proposal, lines)):
    np.testing.assert_array_equal(label, scene(index))
  # The color of void in VOC is known, and a stray pixel is no class.
  store = as_void_table([224, 224, 192], *COLORS[:2], COLORS[1])
  _, proposal = proposed(tmp_path, store, lines)
  assert proposal.label_map == '#e0e0c0:void'

  def stray(index):
    label = COLORS[scene(index, 2)]
    label[0, 0] = COLORS[2]
    return label

  _, proposal = proposed(tmp_path, stray, lines)
  assert proposal.label_map == 'other:void'


def test_colors_are_counted(tmp_path):
  _, proposal = proposed(tmp_path, as_table(*COLORS))
  pixels = [sum((scene(i) == c).sum() for i in range(4)) for c in range(3)]
  assert proposal.table == tuple(
    f'{code}  {name}  {count:,} pixels, {count / 9600:.2%}'
    for code, name, count in zip(
      ('#3c783c', '#dc3c3c', '#3c3cdc'), NAMES, pixels, strict=True
    )
  )
  assert 'cannot be known' in proposal.reason
