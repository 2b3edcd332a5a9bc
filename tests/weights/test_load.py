"""Loaders by name or passed as functions, and what they are given."""

import functools

import numpy as np
import pytest
import tensorflow_datasets as tfds

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

<<<<<<<< HEAD:tests/weights/test_load.py

@pytest.fixture
def slim(monkeypatch, tmp_path):
  """Function (shapes) -> a file that a stand-in for TensorFlow reads so."""

  def write(shapes, name='model.ckpt'):
    _, *others = load._KINDS['TensorFlow']
    monkeypatch.setitem(
      load._KINDS, 'TensorFlow', (lambda path: fill(shapes), *others)
    )
    path = tmp_path / name
    path.write_bytes(b'x' * 100 + bytes.fromhex('57fb808b247547db'))
    return path

  return write


def assert_backbone_is_loaded(variables, report):
  for path, leaf in flatten(variables).items():
    if '/backbone/' in path:
      assert leaf.min() >= 0.5, path
    else:
      assert not leaf.any(), path
  assert set(report.initial.values()) == {'the file holds a backbone alone'}


def test_keras_loads_the_backbone(keras_file):
  variables, report = load_pretrained(
    str(keras_file), empty('keras'), preset='keras'
  )
  assert_backbone_is_loaded(variables, report)
  assert len(report.loaded) == 270
  text = str(report)
  assert text.startswith('loaded: 270 arrays\n')
  assert 'aspp/atrous1, aspp/atrous2' in text and 'logits/bias' in text
  assert text.endswith('not used: nothing')


def test_model_saved_whole_with_its_top_loads_as_well(tmp_path, keras_file):
  import h5py

  path = tmp_path / 'whole.h5'
  arrays = fill(keras_shapes(BASE, top=True))
  write_keras(tmp_path / 'flat.h5', arrays)
  with (
    h5py.File(path, 'w') as file,
    h5py.File(tmp_path / 'flat.h5') as flat,
========
  def loader(
    *,
    directory,
    prepared_dir,
    splits,
    ignore_label,
    label_map,
    on_bad_image,
    strength=1,
>>>>>>>> data:tests/data/test_load.py
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
<<<<<<<< HEAD:tests/weights/test_load.py
  assert report.initial == dict.fromkeys(
    ['params/logits/bias', 'params/logits/kernel'], 'the file has other classes'
  )
  assert not variables['params']['logits']['bias'].any()
  assert variables['params']['aspp']['conv']['conv']['kernel'].all()
  assert (
    report.unused['DeepLab_v3/logits/weights']
    == 'class layer for 21 classes, the network has 7'
  )


def refused(source, variables=None, **options):
  """The one line that says why."""
  with pytest.raises(UserError) as error:
    load_pretrained(str(source), variables or empty('keras'), **options)
  message = str(error.value)
  assert '\n' not in message
  return message


def test_preset_that_the_source_cannot_serve_is_named(keras_file):
  message = refused(keras_file, preset='timm')
  assert message.startswith(str(keras_file))
  assert 'preset keras, which contradicts preset=timm' in message


def test_other_backbone_is_named(tmp_path):
  path = tmp_path / 'r101.h5'
  write_keras(path, fill(keras_shapes(BASE, units=(3, 4, 23, 3))))
  message = refused(path)
  assert f'{path} looks like resnet101, the network is resnet50' in message
  message = refused(path, empty('keras', 'resnet18'))
  assert 'looks like resnet101, the network is resnet18' in message


def test_other_width_is_named_by_the_shapes(keras_file):
  message = refused(keras_file, empty('keras', width=BASE / 32))
  assert 'arrays of another shape' in message
  assert str(keras_file) in message


def test_arrays_that_fit_nothing_or_are_missing_can_be_allowed(tmp_path):
  arrays = fill(keras_shapes(BASE))
  del arrays['conv1_conv/bias']
  arrays['extra/kernel'] = np.ones(3, np.float32)
  path = write_keras(tmp_path / 'odd.h5', arrays)
  assert 'without a place in the network: extra/kernel' in refused(path)
  message = refused(path, allow=['extra/*'])
  assert 'missing in the file: params/backbone/stem/bias' in message
  variables, report = load_pretrained(
    str(path), empty('keras'), allow=['extra/*', '*/stem/bias']
  )
  assert report.unused == {'extra/kernel': 'allowed by name'}
  assert report.initial['params/backbone/stem/bias'] == 'allowed by name'
  assert not variables['params']['backbone']['stem']['bias'].any()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_array_that_is_not_finite_is_named(tmp_path, value):
  arrays = fill(keras_shapes(BASE))
  arrays['post_bn/gamma'][3] = value
  path = write_keras(tmp_path / 'nan.h5', arrays)
  message = refused(path)
  assert 'not finite: params/backbone/postnorm/scale' in message


@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
@pytest.mark.parametrize('kind', ['keras', 'timm'])
def test_truncated_file_is_named(tmp_path, kind, share, keras_file, timm_file):
  whole = keras_file if kind == 'keras' else timm_file
  content = whole.read_bytes()
  path = tmp_path / whole.name
  path.write_bytes(content[: int(len(content) * share)])
  message = refused(path, empty(kind))
  assert str(path) in message and 'truncated or damaged' in message


def tar_of(path, members, mode='w:gz'):
  with tarfile.open(path, mode) as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def zip_of(name):
  content = io.BytesIO()
  with zipfile.ZipFile(content, 'w') as file:
    file.writestr(zipfile.ZipInfo(name), pickle.dumps({'a': 1}))
  return content.getvalue()


def npz():
  content = io.BytesIO()
  np.savez(content, a=np.ones(3))
  return content.getvalue()
========
  assert given['directory'] == '/data' and given['label_map'] == '1:2'
  assert given['ignore_label'] == 7 and given['on_bad_image'] == 'skip'
  assert given['strength'] == 5
>>>>>>>> data:tests/data/test_load.py


@pytest.mark.parametrize(
  'name, known',
  [
<<<<<<<< HEAD:tests/weights/test_load.py
    ('model.h5', b'', 'is empty'),
    ('model.h5', b'nonsense' * 100, 'truncated or of no known kind'),
    ('model.ckpt', b'nonsense' * 100, 'truncated or of no known kind'),
    ('model.h5', b'<!doctype html>' * 9, 'is a web page'),
    ('model.safetensors', b'version https://git-lfs.github.com', 'git-lfs'),
    ('model.pth', pickle.dumps({'a': 1}), 'is a pickle'),
    ('model.h5', pickle.dumps({'a': 1}, 2), 'is a pickle'),
    ('model.pth', zip_of('archive/data.pkl'), 'is a zip file'),
    ('model.npz', npz(), 'is a zip file'),
    (
      'model.tar.gz',
      gzip.compress(b'x' * 1000, mtime=0),
      'truncated or damaged',
    ),
    ('x.safetensors', b'\x10' + b'\0' * 7 + b'{' * 99, 'truncated or damaged'),
========
    ('shapes', 'none'),
    ('folder', 'none'),
    ('voc2012_segmentation', 'none'),
    ('voc2012_segmentation/trainaug', 'none'),
    ('voc2012_segmentation/list', 'list, holdout'),
    (load_stripes, 'count'),
    (functools.partial(load_stripes, count=4), 'none'),
>>>>>>>> data:tests/data/test_load.py
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
<<<<<<<< HEAD:tests/weights/test_load.py
    ('tensorflow', 'slim', "pip install 'deeplab_jax[tf]'"),
    ('huggingface_hub', 'hf://timm/resnetv2_50.x', "'deeplab_jax[hf]'"),
  ],
)
def test_missing_extra_names_the_command(
  tmp_path, monkeypatch, missing, source, command
):
  table = tmp_path / 'x.ckpt'
  table.write_bytes(b'x' * 9 + bytes.fromhex('57fb808b247547db'))
  monkeypatch.setitem(sys.modules, missing, None)
  assert command in refused(table if source == 'slim' else source)


def test_hub_is_asked_for_the_file(monkeypatch, timm_file):
  import types

  asked = []
  hub = types.SimpleNamespace(
    hf_hub_download=lambda *args: asked.append(args) or str(timm_file)
  )
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  source = 'hf://timm/resnetv2_50.a1h_in1k'
  _, report = load_pretrained(source, empty('timm'))
  assert len(report.loaded) > 200
  assert asked == [('timm/resnetv2_50.a1h_in1k', 'model.safetensors')]

  def gone(*args):
    raise OSError('no route\nto host')

  hub.hf_hub_download = gone
  message = refused(source, empty('timm'))
  assert message.startswith(f'{source} cannot be fetched: no route')


def test_keras_is_downloaded_for_the_backbone_and_cached(
  keras_file, monkeypatch, tmp_path
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  md5 = hashlib.md5(keras_file.read_bytes()).hexdigest()
  url = 'http://127.0.0.1:9/weights.h5'  # nobody listens there
  monkeypatch.setitem(keras.PUBLISHED, 'resnet50', (url, md5))
  assert f'weights.h5 cannot be downloaded: {url}' in refused('keras')
  cached = tmp_path / 'deeplab_jax' / 'weights.h5'
  cached.write_bytes(keras_file.read_bytes())
  _, report = load_pretrained('keras', empty('keras'))
  assert len(report.loaded) == 270
  cached.write_bytes(keras_file.read_bytes()[:-1])
  assert f'weights.h5 cannot be downloaded: {url}' in refused('keras')
  message = refused('keras', empty('keras', 'resnet18'))
  assert "'keras' has weights for resnet50, resnet101, resnet152" in message
========
    ({'directory': '/data'}, 'config.data.dir=/data is for'),
    ({'label_map': '0:1'}, 'config.data.label_map=0:1 is for'),
    ({'ignore_label': 256}, 'config.data.ignore_label must be 0 to 255'),
    ({'on_bad_image': 'drop'}, "on_bad_image must be 'stop' or 'skip'"),
  ],
)
def test_a_setting_that_would_not_be_read_is_refused(arguments, words):
  with pytest.raises(UserError) as caught:
    load.load_dataset('shapes', **arguments)
  assert words in str(caught.value)
>>>>>>>> data:tests/data/test_load.py
