"""What --mode=prepare says of a data set, against counts by hand."""

import io
import json

import miniature_voc
import numpy as np
import pytest
from miniature import SETTINGS, make_config
from PIL import Image

from deeplab_jax import build
from deeplab_jax import config as default_config
from deeplab_jax.data import load, shapes
from deeplab_jax.prepare import prepare
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.visualize import labels as visualize

PAGES = [
  'prepare.json',
  'prepare.txt',
  'train.png',
  'train_trained.png',
  'val.png',
]


@pytest.fixture
def settings(voc_folder, tmp_path):
  return {
    **SETTINGS,
    'data.dir': str(voc_folder),
    'data.prepared_dir': str(tmp_path / 'prepared'),
  }


def image_size(path):
  with Image.open(path) as image:
    return image.size


def rows(text):
  """Lines as lists of words."""
  return [line.split() for line in text.splitlines()]


def test_table_holds_what_was_counted_by_hand(settings, tmp_path, capsys):
  prepare(make_config(settings), tmp_path / 'w')
  output = capsys.readouterr().out
  root = tmp_path / 'mini'
  sizes = {}
  for split in ('train', 'val'):
    paths = (root / 'JPEGImages').glob(f'{split}_*')
    sizes[split] = [image_size(path) for path in paths]
  # every label has two boxes of 15x20, and a void row at the top
  pixels = {
    split: [sum(w * (h - 1) for w, h in found), 300 * len(found)]
    for split, found in sizes.items()
  }
  for name in ('left', 'right'):
    expected = [name]
    for split, count in (('train', '6'), ('val', '3')):
      whole, boxes = pixels[split]
      expected += [count, f'{boxes:,}', f'{100 * boxes / whole:.2f}']
    assert expected in rows(output)
  expected = ['all', 'classes']
  for split, count in (('train', '6'), ('val', '3')):
    expected += [count, f'{pixels[split][0]:,}', '100.00']
  assert expected in rows(output)
  expected = ['void,', 'of', 'all', 'pixels']
  for found in sizes.values():
    void, whole = sum(w for w, _ in found), sum(w * h for w, h in found)
    expected += [f'{void:,}', f'{100 * void / whole:.2f}']
  assert expected in rows(output)
  by_area = {
    s: sorted(f, key=lambda size: size[0] * size[1]) for s, f in sizes.items()
  }
  for name, index in (('smallest', 0), ('largest', -1)):
    expected = [name]
    for found in by_area.values():
      width, height = found[index]
      expected.append(f'{width}x{height}')
    assert expected in rows(output)
  assert ['images', '6', '3'] in rows(output)
  counts = [str(len(set(found))) for found in sizes.values()]
  assert ['sizes', *counts] in rows(output)


def test_files_say_what_the_screen_says(settings, tmp_path, capsys):
  result = prepare(make_config(settings), tmp_path / 'w')
  output = tmp_path / 'w' / 'prepare'
  assert sorted(path.name for path in output.iterdir()) == PAGES
  saved = json.loads((output / 'prepare.json').read_text())
  assert saved == json.loads(json.dumps(result))
  shown = capsys.readouterr().out
  text = (output / 'prepare.txt').read_text()
  pages = ('train.png', 'val.png', 'train_trained.png')
  assert shown == text + ''.join(f'{output}/{name}\n' for name in pages)
  assert text.startswith('num_classes: 3 (the labels hold 0 to 2 and void, 255')
  assert result['dataset']['classes'] == ['ground', 'left', 'right']
  assert result['splits']['val']['class_pixels'][1:] == [900, 900]
  for split in ('train', 'val'):
    with Image.open(output / f'{split}.png') as page:
      assert page.mode == 'RGB' and page.width > 1000


def test_a_page_shows_the_first_images_of_training_as_it_sees_them(
  settings, tmp_path
):
  def own(image, label, rng):
    image = image.copy()
    image[0] = rng.integers(255)
    return image, label

  changed = {
    'data__rotate': 20.0,
    'data__noise': 9.0,
    'data__cutout': 0.3,
    'data__class_sampling': 0.5,
    'data__transforms': (own,),
    'seed': 3,
  }
  config = make_config(settings, **changed)
  prepare(config, tmp_path / 'w')
  with Image.open(tmp_path / 'w/prepare/train_trained.png') as page:
    page = np.asarray(page)
  dataset = build.open_dataset(config, 'train', 'val')
  batches = build.make_iterator(config, dataset)
  seen = [next(batches), next(batches)]  # of four images each
  batches.close()
  images = np.concatenate([batch['image'] for batch in seen])
  maps = np.concatenate([batch['label'] for batch in seen])
  for row in range(8):
    top = row * (33 + 4)
    np.testing.assert_array_equal(page[top : top + 33, :33], images[row])
    colors = visualize.colorize(maps[row], dataset.info.palette)
    np.testing.assert_array_equal(page[top : top + 33, 37:70], colors)


def test_class_weights_can_be_pasted(settings, tmp_path, capsys):
  result = prepare(make_config(settings), tmp_path / 'w')
  (line,) = [
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('--config.loss.class_weights=')
  ]
  config = make_config(settings)
  config.loss.class_weights = line.partition('=')[2]
  default_config.validate(config)
  given = config.loss.class_weights
  # both boxes have one frequency, which is the median of the three
  counts = result['splits']['train']['class_pixels']
  assert given == pytest.approx([1800 / counts[0], 1, 1], rel=1e-3)
  assert list(given) == result['class_weights']


def test_without_workdir_all_lies_beside_the_records(
  settings, tmp_path, capsys
):
  config = make_config(settings)
  prepare(config, None)
  (output,) = (tmp_path / 'prepared').rglob('prepare')
  assert sorted(path.name for path in output.iterdir()) == PAGES
  assert f'{output}/train.png' in capsys.readouterr().out
  before = set(output.iterdir())
  prepare(config, None)  # the records are found again
  assert before == set(output.iterdir())
  assert list((tmp_path / 'prepared').rglob('prepare')) == [output]


def test_shapes_are_prepared_too(tmp_path, monkeypatch, capsys):
  class FewShapes(shapes.ShapesConfig):
    def __init__(self):
      super().__init__(train=3, val=2)

  monkeypatch.setattr(load.shapes, 'ShapesConfig', FewShapes)
  config = make_config({'data.prepared_dir': str(tmp_path / 'prepared')})
  result = prepare(config, tmp_path / 'w')
  builder = load.load_dataset('shapes', prepared_dir=str(tmp_path / 'prepared'))
  for split, count in (('train', 3), ('val', 2)):
    pixels = np.zeros(256, np.int64)
    for record in builder.source(split):
      label = np.array(Image.open(io.BytesIO(record['label'])))
      pixels += np.bincount(label.ravel(), minlength=256)
    found = result['splits'][split]
    assert found['num_images'] == count
    assert found['class_pixels'] == pixels[:6].tolist()
    assert found['void_pixels'] == pixels[255]
  absent = [f for f in result['findings'] if 'without a pixel' in f['title']]
  expected = [
    f'{name} in {split}'
    for split in ('train', 'val')
    for name, count in zip(
      result['dataset']['classes'],
      result['splits'][split]['class_pixels'],
      strict=True,
    )
    if not count
  ]
  assert absent and list(absent[0]['examples']) == expected[:5]
  assert 'warning: classes without a pixel' in capsys.readouterr().out


def test_voc_is_set_beside_the_published_counts(tmp_path, capsys):
  miniature_voc.write_voc_devkit(tmp_path / 'voc', test=True)
  config = make_config(
    {
      'data.name': 'voc2012_segmentation',
      'data.dir': str(tmp_path / 'voc'),
      'data.prepared_dir': str(tmp_path / 'prepared'),
    }
  )
  result = prepare(config, tmp_path / 'w')
  lists = {
    'train': miniature_voc.VOC_TRAIN,
    'val': miniature_voc.VOC_VAL,
    'trainval': miniature_voc.VOC_TRAIN + miniature_voc.VOC_VAL,
  }
  for split, names in lists.items():
    pixels = np.zeros(256, np.int64)
    for name in names:
      label = miniature_voc.scenes()[name].voc_label
      pixels += np.bincount(label.ravel(), minlength=256)
    found = result['splits'][split]
    assert found['class_pixels'] == pixels[:21].tolist()
    assert found['void_pixels'] == pixels[255]
  lines = rows(capsys.readouterr().out)
  assert ['images', '8', '6', '14', '3'] in lines
  assert ['published', 'images', '1,464', '1,449', '2,913', '1,456'] in lines
  assert ['train:', '8,', 'and', '1,464', 'published'] in lines
  # the test images have no labels to show
  assert sorted(
    path.name for path in (tmp_path / 'w' / 'prepare').iterdir()
  ) == (sorted([*PAGES, 'trainval.png']))


def test_folder_with_errors_is_reported_whole_and_refused(
  settings, voc_folder, tmp_path, capsys
):
  for index in range(3):
    (voc_folder / 'JPEGImages' / f'train_{index}.jpg').unlink()
  Image.new('L', (9, 7)).save(voc_folder / 'SegmentationClass' / 'val_1.png')
  (voc_folder / 'classes.txt').write_text('ground\nleft\n')
  with pytest.raises(UserError) as caught:
    prepare(make_config(settings), tmp_path / 'w')
  assert str(caught.value) == (
    f'{voc_folder}: cannot be used; correct the 5 errors listed above, or try'
    ' what is proposed'
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('num_classes: 3 (') and 'has 2 names' in lines[0]
  assert [line for line in lines if line.startswith('error: ')] == [
    'error: listed ids without exactly one image and a label: 3',
    'error: labels of another size than their image: 1',
    'error: label values that are neither a class nor the ignore label: 1',
  ]
  assert not (tmp_path / 'prepared').exists()
  drawn = sorted(path.name for path in (tmp_path / 'w' / 'prepare').iterdir())
  assert drawn == ['train_proposed.png', 'val_proposed.png']


@pytest.mark.parametrize('tile', [0, 40])
def test_proposals_for_images_as_stored_are_drawn_too(
  settings, voc_folder, tmp_path, capsys, tile
):
  for path in (voc_folder / 'JPEGImages').iterdir():
    height, width = np.array(Image.open(path)).shape[:2]
    bands = np.arange(height * width * 4).reshape(height, width, 4)
    np.save(path.with_suffix('.npy'), bands.astype(np.uint16))
    path.unlink()
  for path in (voc_folder / 'SegmentationClass').iterdir():
    label = np.array(Image.open(path))
    Image.fromarray(np.where(label == 255, 255, 50 * label)).save(path)
  changes = {'data.as_stored': True, 'data.tile': tile or None}
  changes |= {'data.color_jitter': (0, 0, 0, 0)}
  with pytest.raises(UserError, match='or try what is proposed'):
    prepare(make_config({**settings, **changes}), tmp_path / 'w')
  assert '--config.data.label_map=50:1,100:2' in capsys.readouterr().out
  drawn = sorted(path.name for path in (tmp_path / 'w' / 'prepare').iterdir())
  assert drawn == ['train_proposed.png', 'val_proposed.png']


def test_unreadable_files_may_be_left_out(
  settings, voc_folder, tmp_path, capsys
):
  (voc_folder / 'JPEGImages' / 'train_2.jpg').write_bytes(b'broken')
  with pytest.raises(UserError, match='correct the 1 error listed above'):
    prepare(make_config(settings), tmp_path / 'w')
  config = make_config(settings, data__on_bad_image='skip')
  result = prepare(config, tmp_path / 'w')
  assert 'warning: unreadable files: 1' in capsys.readouterr().out
  assert result['splits']['train']['num_images'] == 5


def test_training_split_alone_is_enough(settings, tmp_path):
  result = prepare(make_config(settings, data__eval_split=''), tmp_path / 'w')
  assert list(result['splits']) == ['train']
  assert not (tmp_path / 'w' / 'prepare' / 'val.png').exists()


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('data.dir', '/nope', '/nope: no such dataset folder'),
    ('data.dir', None, 'config.data.dir is empty'),
    ('data.name', 'voc', "no data set 'voc'"),
    ('data.train_split', 'all', 'correct the 1 error listed above'),
  ],
)
def test_source_that_is_not_there_is_refused(
  settings, tmp_path, key, value, words
):
  with pytest.raises(UserError, match=words):
    prepare(make_config({**settings, key: value}), tmp_path / 'w')


def test_workdir_that_cannot_be_written_is_refused_before_the_work(
  settings, tmp_path, capsys
):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file: cannot be written'):
    prepare(make_config(settings), tmp_path / 'file')
  assert capsys.readouterr().out == ''
