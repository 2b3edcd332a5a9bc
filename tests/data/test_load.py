"""Loaders by name or passed as functions, and what they are given."""

import functools
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from deeplab_jax.data import datasets, images, load, records
from deeplab_jax.runtime.errors import UserError

STRIPES = datasets.DatasetInfo('stripes', ('dark', 'light'), np.eye(2, 3))


class Stripes(records.RecordsBuilder):
  """A data set as a user would add it."""

  VERSION = tfds.core.Version('1.0.0')

  def _split_generators(self, dl_manager):
    self.info.metadata['info'] = STRIPES.to_json()
    tally = datasets.Tally(STRIPES.num_classes, STRIPES.ignore_label)
    return {'all of it': (tally, self._generate_examples())}

  def _generate_examples(self):
    for number in range(int(self.builder_config.name)):
      label = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2
      image = images.encode_image(np.stack([label * 99] * 3, -1))
      yield records.Sample(f's{number}', f's{number}.png', image, label)


def load_stripes(*, prepared_dir, count=2):
  config = records.SourceConfig(name=str(count))
  builder = records.prepared(Stripes, prepared_dir, config)
  return dict.fromkeys(builder.info.metadata['splits'], builder)


def load_given(**arguments):
  """What a loader of every argument is given."""
  given = {}

  def loader(
    *,
    directory,
    prepared_dir,
    splits,
    ignore_label,
    label_map,
    on_bad_image,
    strength=1,
  ):
    given.update(locals())
    return load_stripes(prepared_dir=prepared_dir)

  load.load_dataset(loader, splits=('all of it',), **arguments)
  del given['given']
  return given


def test_a_data_set_of_ones_own_needs_no_entry(tmp_path):
  data = load.load_dataset(
    load_stripes,
    prepared_dir=str(tmp_path),
    splits=('all of it',),
    options={'count': 3},
  )
  assert data.info.classes == ('dark', 'light')
  assert data.names('all of it') == ['s0', 's1', 's2']
  assert data.sizes('all of it') == [(3, 4)] * 3
  assert data.tally('all of it').class_pixels.tolist() == [18, 18]
  record = data.source('all of it')[2]
  assert record['name'] == b's2' and record['file_name'] == b's2.png'
  label = images.decode_label(record['label'])
  np.testing.assert_array_equal(label, np.arange(12).reshape(3, 4) % 2)
  np.testing.assert_array_equal(
    images.decode_image(record['image'])[..., 1], 99 * label
  )


def _shown_in(source):
  labels = [images.decode_label(record['label']) for record in source]
  return [sorted({*label.flat} - {255}) for label in labels]


def test_a_prepared_set_knows_the_classes_of_each_label(
  voc_folder, tmp_path, monkeypatch
):
  options = {'directory': str(voc_folder), 'prepared_dir': str(tmp_path / 'p')}
  path = voc_folder / 'SegmentationClass' / 'train_2.png'
  with Image.open(path) as label:
    label.paste(1, (0, 0, *label.size))
    label.save(path)
  data = load.load_dataset('folder', **options)
  expected = _shown_in(data.source('train'))
  monkeypatch.delattr(load, 'decode_label')  # nothing is counted
  assert data.classes_shown('train') == expected
  assert expected.count([1]) == 1 and expected.count([0, 1, 2]) == 5


def test_classes_of_a_set_of_an_older_version_are_counted(voc_folder, tmp_path):
  options = {'directory': str(voc_folder), 'prepared_dir': str(tmp_path / 'p')}
  load.load_dataset('folder', **options)
  for path in (tmp_path / 'p').rglob('metadata.json'):
    metadata = json.loads(path.read_text())
    del metadata['classes']
    path.write_text(json.dumps(metadata))
    (path.parent / 'state.json').unlink()
  data = load.load_dataset('folder', **options)
  assert data.classes_shown('train') == _shown_in(data.source('train'))


def _refuse(*_):
  raise PermissionError


def test_a_data_set_of_ones_own_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(load.LOADERS, 'stripes', load_stripes)
  data = load.load_dataset(
    'stripes', prepared_dir=str(tmp_path), splits=('all of it',)
  )
  assert data.tally('all of it').num_images == 2
  with pytest.raises(UserError, match=r"'stripe'; known: .*shapes.*, stripes"):
    load.load_dataset('stripe')


@pytest.mark.parametrize('empty', ['', None])
def test_what_is_not_set_is_empty_for_every_loader(tmp_path, empty):
  given = load_given(
    directory=empty, label_map=empty, prepared_dir=str(tmp_path)
  )
  assert given == {
    'directory': '',
    'prepared_dir': str(tmp_path),
    'splits': ('all of it',),
    'ignore_label': 255,
    'label_map': '',
    'on_bad_image': 'stop',
    'strength': 1,
  }


def test_a_loader_gets_what_was_set(tmp_path):
  given = load_given(
    directory='/data',
    prepared_dir=str(tmp_path),
    ignore_label=7,
    label_map='1:2',
    on_bad_image='skip',
    options={'strength': 5},
  )
  assert given['directory'] == '/data' and given['label_map'] == '1:2'
  assert given['ignore_label'] == 7 and given['on_bad_image'] == 'skip'
  assert given['strength'] == 5


@pytest.mark.parametrize(
  'name, known',
  [
    ('shapes', 'none'),
    ('folder', 'none'),
    ('voc2012_segmentation', 'none'),
    ('voc2012_segmentation/trainaug', 'none'),
    ('voc2012_segmentation/list', 'list, holdout'),
    (load_stripes, 'count'),
    (functools.partial(load_stripes, count=4), 'none'),
  ],
)
def test_an_unknown_option_is_refused_with_the_known_ones(name, known):
  with pytest.raises(UserError) as caught:
    load.load_dataset(name, options={'size': 3})
  message = str(caught.value)
  assert message.startswith('config.data.options.size: data set ')
  assert message.endswith(f' has no such option; known: {known}')
  shown = name if isinstance(name, str) else 'load_stripes'
  assert shown in message and '\n' not in message


@pytest.mark.parametrize(
  'arguments, words',
  [
    ({'directory': '/data'}, 'config.data.dir=/data is for'),
    ({'label_map': '0:1'}, 'config.data.label_map=0:1 is for'),
    ({'tile': 64}, 'config.data.tile=64 is for'),
    ({'ignore_label': 256}, 'ignore_label must be 0 to 255, got 256'),
    ({'on_bad_image': 'drop'}, 'on_bad_image must be one of stop, skip, got'),
  ],
)
def test_a_setting_that_would_not_be_read_is_refused(arguments, words):
  with pytest.raises(UserError) as caught:
    load.load_dataset('shapes', **arguments)
  assert words in str(caught.value)
