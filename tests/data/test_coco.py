"""COCO's instances as labels, against cases by hand."""

import json

import miniature_layouts as mini
import numpy as np
import pytest

from deeplab_jax.data import coco, images, load, survey
from deeplab_jax.runtime.errors import UserError

SIZE = 6, 8  # height, width


def draw(*annotations, size=SIZE, values=None):
  """The label of an image of these annotations, uint8 [H, W]."""
  image = {'height': size[0], 'width': size[1]}
  png = coco._draw('x.json: a.jpg', values or {1: 1, 2: 2}, image, annotations)
  return images.decode_label(png)


def annotation(segmentation, category=1, **more):
  more = {'id': 5, 'category_id': category, **more}
  return {'segmentation': segmentation, **more}


def box(top, bottom, left, right, value=1):
  label = np.zeros(SIZE, np.uint8)
  label[top:bottom, left:right] = value
  return label


def test_a_polygon_covers_the_pixels_whose_centers_it_holds():
  square = annotation([mini.polygon(2, 1, 5, 4)])
  np.testing.assert_array_equal(draw(square), box(1, 4, 2, 5))
  # It reaches past the centers at 1.5 and 4.5, and past those of rows 0 and 4.
  wide = annotation([mini.polygon(1.4, 0.4, 4.6, 4.51)])
  np.testing.assert_array_equal(draw(wide), box(0, 5, 1, 5))
  outside = annotation([mini.polygon(-3, -3, 2, 99)])
  np.testing.assert_array_equal(draw(outside), box(0, 6, 0, 2))
  parts = annotation([mini.polygon(0, 0, 1, 1), mini.polygon(7, 5, 8, 6)])
  np.testing.assert_array_equal(draw(parts), box(0, 1, 0, 1) + box(5, 6, 7, 8))


@pytest.mark.parametrize('seed', range(5))
def test_a_polygon_is_filled_as_the_even_odd_rule_says(seed):
  points = np.random.default_rng(seed).uniform(-2, 10, (7, 2))
  label = draw(annotation([points.ravel().tolist()]))
  for row, column in np.ndindex(SIZE):
    x, y = column + 0.5, row + 0.5
    inside = False  # a ray to the left crosses an odd number of edges
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
      if (y0 > y) != (y1 > y):
        inside ^= x0 + (y - y0) * (x1 - x0) / (y1 - y0) < x
    assert label[row, column] == inside


def test_runs_go_down_the_columns():
  # Columns of 6: 7 pixels of 0, 4 of 1, the rest of 0: column 1, rows 1 to 4.
  runs = {'size': [6, 8], 'counts': [7, 4, 37]}
  np.testing.assert_array_equal(draw(annotation(runs)), box(1, 5, 1, 2))
  whole = {'size': [6, 8], 'counts': [0, 48]}
  np.testing.assert_array_equal(draw(annotation(whole)), box(0, 6, 0, 8))


def test_compressed_runs_are_unpacked():
  # 7, 4, 37 by hand: '7' is 48 + 7, '4' is 48 + 4; 37 is 5 + 32 more, in two
  # groups, 48 + 5 + 32 and 48 + 1.
  assert coco._unpack('74U1') == [7, 4, 37]
  # From the fourth on each is the difference to the last but one: 4 + 2, 37 - 5
  # (-5 is 27 in 5 bits with the sign's bit set).
  assert coco._unpack('74U12K') == [7, 4, 37, 6, 32]
  runs = {'size': [6, 8], 'counts': '74U1'}
  np.testing.assert_array_equal(draw(annotation(runs)), box(1, 5, 1, 2))
  # Written by pycocotools 2.0.11 for the runs [5, 3, 400, 2, 1, 77, 3, 1].
  assert coco._unpack('53`<OaC[22dM') == [5, 3, 400, 2, 1, 77, 3, 1]


def test_smaller_instances_lie_on_top_and_crowds_below_as_void():
  large = annotation([mini.polygon(0, 0, 8, 4)], 1)
  small = annotation([mini.polygon(2, 1, 5, 3)], 2)
  crowd = annotation({'size': [6, 8], 'counts': [0, 48]}, 1, iscrowd=1)
  expected = np.full(SIZE, 255)
  expected[:4] = 1
  expected[1:3, 2:5] = 2
  for order in ((large, small, crowd), (crowd, small, large)):
    np.testing.assert_array_equal(draw(*order), expected)
  np.testing.assert_array_equal(draw(), np.zeros(SIZE))


def content(root, split='train'):
  path = root / f'annotations/instances_{split}2017.json'
  return path, json.loads(path.read_text())


def load_coco(root, tmp_path, splits=('train', 'val'), **options):
  return load.load_dataset(
    'coco',
    directory=str(root),
    prepared_dir=str(tmp_path / 'prepared'),
    splits=splits,
    options=options,
  )


@pytest.fixture
def root(tmp_path):
  return mini.coco(tmp_path / 'coco', {'train': 3, 'val': 2})


def test_sparse_categories_become_classes_after_the_background(root, tmp_path):
  data = load_coco(root, tmp_path)
  assert data.info.classes == ('background', 'left', 'right')
  ids = [f'val2017/val{index:012d}' for index in range(2)]
  assert data.names('val') == ids  # not those of another split
  for record in data.source('train'):
    label = images.decode_label(record['label'])
    np.testing.assert_array_equal(label, mini.scene(0)[1])


def test_a_category_named_background_is_the_background(root, tmp_path):
  path, values = content(root, 'val')
  values['categories'][0]['name'] = 'Background'
  values['images'][1]['id'] = 999  # without annotations
  path.write_text(json.dumps(values))
  data = load_coco(root, tmp_path, ['val'])
  assert data.info.classes == ('background', 'left')
  first, last = (images.decode_label(x['label']) for x in data.source('val'))
  np.testing.assert_array_equal(first, mini.scene(0)[1] == 1)
  assert not last.any()


def test_a_changed_json_is_prepared_again(root, tmp_path):
  load_coco(root, tmp_path)
  path, values = content(root, 'val')
  values['annotations'] = []
  path.write_text(json.dumps(values))
  pixels = load_coco(root, tmp_path).tally('val').class_pixels
  assert pixels.tolist() == [2 * 40 * 48, 0, 0]


def test_one_json_for_all_splits_is_divided(tmp_path):
  names = [f'{index:03d}' for index in range(10)]
  for seed, name in enumerate(names):
    mini.save(tmp_path / 'images/default' / f'{name}.jpg', mini.scene(seed)[0])
  path = tmp_path / 'annotations/instances_default.json'
  path.parent.mkdir()
  path.write_text(
    json.dumps(mini.coco_content([f'default/{x}' for x in names]))
  )
  options = {'json': 'annotations/instances_default.json', 'holdout': 0.3}
  data = load_coco(tmp_path, tmp_path, **options)
  train, val = data.names('train'), data.names('val')
  assert len(val) == 3 and sorted(train + val) == [
    f'default/{x}' for x in names
  ]


def no_json(root):
  content(root)[0].unlink()


def two_jsons(root):
  path, values = content(root)
  path.with_name('instances_train2014.json').write_text(json.dumps(values))


def cut(root):
  path, _ = content(root)
  path.write_bytes(path.read_bytes()[:99])


def change(function):
  def damage(root):
    path, values = content(root)
    function(values)
    path.write_text(json.dumps(values))

  return damage


def image(**changes):
  return change(lambda values: values['images'][1].update(changes))


def first(**changes):
  return change(lambda values: values['annotations'][0].update(changes))


@pytest.mark.parametrize(
  'damage, words',
  [
    (no_json, ['_train*.json: 0 such files', '_val2017.json']),
    (two_jsons, ['2 such files', 'train2014', 'options.json']),
    (cut, ['instances_train2017.json: not as COCO defines it', 'export']),
    (change(lambda x: x.pop('categories')), ["no 'categories'"]),
    (
      change(lambda x: x['categories'].append(x['categories'][0])),
      ['category ids must differ'],
    ),
    (change(lambda x: x['images'].clear()), ['must have images']),
    (change(lambda x: x['categories'].clear()), ["no 'category 3'"]),
    (image(file_name='../../x.jpg'), ["'../../x.jpg' leads out of"]),
    (image(file_name='/x.jpg'), ["'/x.jpg' leads out of"]),
    (image(file_name='gone.jpg'), ['train2017/gone.jpg is no file']),
    (image(file_name='train000000000000.jpg'), ['stands 2 times']),
    (image(id=100), ["'image 100' stands 2 times"]),
    (change(lambda x: x['images'][1].pop('height')), ['.jpg', "no 'height'"]),
    (image(width=0), ['train000000000001.jpg', 'a size must fit']),
    (image(width=7), ['must fill the image, (40, 7)']),
    (first(segmentation=[]), ['.jpg', 'annotation 1', 'must not be empty']),
    (first(segmentation=[[1, 2, 3]]), ['00.jpg: not as COCO defines it']),
    (first(segmentation={'size': [3, 3], 'counts': [9]}), ['must fill', '40']),
    (first(segmentation={'size': [40, 48], 'counts': '~'}), ['must fill']),
    (first(segmentation=[[0, 0, 9, float('nan'), 1, 1]]), ['be finite']),
    (first(category_id=4), ["no 'category 4'"]),
  ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_it(root, tmp_path, damage, words):
  damage(root)
  with pytest.raises(UserError) as caught:
    load_coco(root, tmp_path)
  message = str(caught.value)
  assert '\n' not in message and all(word in message for word in words), message
  layout = load.find_layout('coco', {})
  found = survey.survey_folder(root, ('train', 'val'), layout=layout).findings
  assert any(x.fatal for x in found)


def test_an_image_of_another_size_than_in_the_json_is_named(root, tmp_path):
  change(lambda x: x['annotations'].clear() or x['images'][1].update(width=7))(
    root
  )
  with pytest.raises(UserError, match=r'000001.jpg: label is 7x40 .* 48x40'):
    load_coco(root, tmp_path)


def test_splits_of_other_categories_are_refused(root, tmp_path):
  change(lambda x: x['categories'].append({'id': 9, 'name': 'third'}))(root)
  with pytest.raises(UserError, match='its classes are not those of train'):
    load_coco(root, tmp_path)
