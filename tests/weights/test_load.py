"""Each source loads, and each that cannot be used is one line."""

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from reference import (
  fill,
  keras_shapes,
  slim_shapes,
  timm_shapes,
  write_keras,
  write_timm,
)

from deeplab_jax import deeplab_v3, load_pretrained
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights import keras, load
from deeplab_jax.weights.load import open_pretrained
from deeplab_jax.weights.mapping import flatten

pytestmark = pytest.mark.compiles

BASE = 4  # channels of the stem


def empty(preset, backbone='resnet50', classes=5, width=BASE / 64, aspp=8):
  """Variables of zeros."""
  model = deeplab_v3(
    backbone,
    num_classes=classes,
    preset=preset,
    width=width,
    aspp_features=aspp,
  )
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 33, 33, 3)), train=False)
  )
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.fixture(scope='module')
def keras_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('keras') / 'r50.h5'
  return write_keras(path, fill(keras_shapes(BASE)))


@pytest.fixture(scope='module')
def timm_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('timm') / 'model.safetensors'
  return write_timm(path, fill(timm_shapes(BASE)))


@pytest.fixture
def slim(monkeypatch, tmp_path):
  """Function (shapes) -> a file that a stand-in for TensorFlow reads so."""

  def write(shapes, name='model.ckpt'):
    monkeypatch.setitem(
      load._KINDS,
      'TensorFlow',
      (lambda path: fill(shapes), *load._KINDS['TensorFlow'][1:]),
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
  ):
    group = file.create_group('model_weights')
    for name in flat:
      flat.copy(name, group)
    group.attrs['layer_names'] = flat.attrs['layer_names']
  variables, report = load_pretrained(str(path), empty('keras'))
  assert_backbone_is_loaded(variables, report)
  assert report.unused == dict.fromkeys(
    ['predictions/bias', 'predictions/kernel'], 'ImageNet classifier'
  )


def test_timm_loads_the_backbone(timm_file):
  variables, report = load_pretrained(
    str(timm_file), empty('timm'), preset='timm'
  )
  assert_backbone_is_loaded(variables, report)
  assert set(report.unused) == {'head.fc.weight', 'head.fc.bias'}


def test_slim_classifier_serves_two_presets(slim):
  path = slim(list(slim_shapes(BASE, head=False)))
  for preset in ('slim', 'seed'):
    variables, report = load_pretrained(str(path), empty(preset), preset=preset)
    assert_backbone_is_loaded(variables, report)
  assert open_pretrained(str(path)).preset_for('') == 'slim'


def test_seed_checkpoint_loads_whole(slim):
  path = slim(list(slim_shapes(BASE)))
  variables, report = load_pretrained(
    str(path), empty('seed', classes=21, aspp=256)
  )
  assert not report.initial
  assert all(leaf.min() >= 0.5 for leaf in jax.tree.leaves(variables))
  pretrained = open_pretrained(str(path))
  assert pretrained.presets == ('seed',)
  assert pretrained.num_classes == 21
  assert pretrained.settings == {
    'backbone': 'resnet50',
    'width': BASE / 64,
    'aspp_features': 256,
  }


def test_other_number_of_classes_keeps_all_but_the_class_layer(slim):
  path = slim(list(slim_shapes(BASE)))
  variables, report = load_pretrained(
    str(path), empty('seed', classes=7, aspp=256)
  )
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


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('model.h5', b'', 'is empty'),
    ('model.h5', b'nonsense' * 100, 'truncated or of no known kind'),
    ('model.ckpt', b'nonsense' * 100, 'truncated or of no known kind'),
    ('model.h5', b'<!doctype html>' * 9, 'is a web page'),
    ('model.safetensors', b'version https://git-lfs.github.com', 'git-lfs'),
    ('model.pth', pickle.dumps({'a': 1}), 'is a pickle'),
    ('model.h5', pickle.dumps({'a': 1}, 2), 'is a pickle'),
    ('model.pth', zip_of('archive/data.pkl'), 'torch'),
    ('model.keras', zip_of('config.json'), 'is a zip file'),
    ('model.npz', npz(), 'is a zip file'),
    (
      'model.tar.gz',
      gzip.compress(b'x' * 1000, mtime=0),
      'truncated or damaged',
    ),
    ('x.safetensors', b'\x10' + b'\0' * 7 + b'{' * 99, 'truncated or damaged'),
  ],
)
def test_file_that_is_not_what_it_claims_is_refused(
  tmp_path, name, content, words
):
  path = tmp_path / name
  path.write_bytes(content)
  message = refused(path)
  assert str(path) in message and words in message


def test_nothing_is_ever_unpickled(tmp_path):
  class Bomb:
    def __reduce__(self):
      return open, (str(tmp_path / 'ran'), 'w')

  path = tmp_path / 'model.ckpt'
  path.write_bytes(pickle.dumps(Bomb()))
  refused(path)
  assert not (tmp_path / 'ran').exists()


def test_hdf5_without_layers_is_refused(tmp_path):
  import h5py

  path = tmp_path / 'x.h5'
  with h5py.File(path, 'w') as file:
    file['a'] = np.ones(3)
  assert 'no layers of Keras' in refused(path)


@pytest.mark.parametrize('name', ['nowhere.h5', 'nowhere/x.ckpt'])
def test_missing_file_is_named_beside_what_there_may_be(tmp_path, name):
  message = refused(tmp_path / name)
  assert f'no file {tmp_path / name}' in message and 'hf://' in message


def test_folder_without_checkpoints_is_named(tmp_path):
  assert f'{tmp_path} is a folder without' in refused(tmp_path)


@pytest.mark.parametrize('name', ['../out.ckpt', '/tmp/out.ckpt', 'a/../../o'])
def test_tar_that_leads_out_of_its_folder_is_refused(tmp_path, name, slim):
  slim([])
  path = tar_of(tmp_path / 'x.tar.gz', {'a.ckpt': b'x', name: b'x'})
  message = refused(path)
  if name.startswith('/'):  # taken as relative, as tar does
    assert 'found a.ckpt, out.ckpt' in message
  else:
    assert f'{path} is refused' in message and 'outside' in message
  assert not (tmp_path / 'out.ckpt').exists()


@pytest.mark.parametrize('mode', ['w:gz', 'w'])
def test_checkpoint_is_found_in_a_tar(tmp_path, slim, mode):
  path = slim(list(slim_shapes(BASE, head=False)), 'resnet_v2_50.ckpt')
  tar = tar_of(
    tmp_path / 'x.tar.gz',
    {'resnet_v2_50.ckpt': path.read_bytes(), 'train.graph': b'x'},
    mode,
  )
  variables, report = load_pretrained(str(tar), empty('slim'))
  assert_backbone_is_loaded(variables, report)


@pytest.mark.parametrize('members', [{}, {'a.ckpt': b'x', 'b.ckpt': b'x'}])
def test_tar_without_a_single_checkpoint_is_refused(tmp_path, members):
  path = tar_of(tmp_path / 'x.tar.gz', {**members, 'readme': b'x'})
  found = ', '.join(members) or 'none'
  assert 'should hold one checkpoint' in refused(path)
  assert f'found {found}' in refused(path)


def test_truncated_tar_is_named(tmp_path):
  content = np.random.default_rng(0).bytes(100_000)
  path = tar_of(tmp_path / 'x.tar.gz', {'a.ckpt': content})
  path.write_bytes(path.read_bytes()[:50_000])
  assert 'truncated or damaged' in refused(path)


@pytest.mark.parametrize(
  'missing, source, command',
  [
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
