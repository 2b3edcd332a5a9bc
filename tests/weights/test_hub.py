"""A published network is what was written, or one line says what is wrong."""

import json
import sys
import traceback

import hub_server
import numpy as np
import pytest
import safetensors.numpy

from deeplab_jax import deeplab_v3, load_pretrained
from deeplab_jax.data.datasets import DatasetInfo, voc_palette
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights import hub
from deeplab_jax.weights.load import open_pretrained

pytestmark = pytest.mark.compiles

SETTINGS = {
  'preset': 'timm',
  'backbone': 'resnet18',
  'width': 0.125,
  'multi_grid': (1, 2, 1),
  'aspp_features': 8,
  'aspp_rates': (3, 6),
  'decoder': 'v3plus',
  'bn_epsilon': None,
  'output_stride': 16,
  'dtype': 'bfloat16',
  'bn_decay': 0.9,  # of training alone
}
INFO = DatasetInfo(
  'bands',
  ('water', 'land', '"[name](http://x)'),
  voc_palette(3),
  ignore_label=200,
  values=(3, 5, 9),
  void_value=0,
  bits=16,
  mean=(100.0, 2000.5, 7.25, 900.0),
  std=(50.0, 700.0, 3.0, 1.0),
)


@pytest.fixture(scope='module')
def network(random_variables):
  settings = {k: v for k, v in SETTINGS.items() if v is not None}
  model = deeplab_v3(num_classes=3, **settings, **INFO.normalization)
  return model, random_variables(model)


@pytest.fixture
def folder(network, tmp_path):
  hub.write(tmp_path, '0.1.0', SETTINGS, INFO.to_json(), network[1])
  return tmp_path


@pytest.mark.parametrize('stride', [8, 16])
def test_a_network_opens_at_the_output_stride_it_had(
  tmp_path, random_variables, stride
):
  settings = {**SETTINGS, 'preset': 'vainf', 'bn_epsilon': 1e-5}
  settings['output_stride'] = stride
  model = deeplab_v3(num_classes=3, **settings, **INFO.normalization)
  variables = random_variables(model)
  hub.write(tmp_path, '0.1.0', settings, INFO.to_json(), variables)
  found = Predictor.from_pretrained(tmp_path).model
  assert found.backbone.output_stride == stride
  assert found.aspp.rates == model.aspp.rates


def test_a_network_of_bands_is_read_as_it_was_written(network, folder):
  found = Predictor.from_pretrained(folder)
  image = np.random.default_rng(0).integers(0, 3000, (50, 70, 4), np.uint16)
  pairs = zip(
    found(image, probabilities=True),
    Predictor(*network, INFO)(image, probabilities=True),
    strict=True,
  )
  for own, other in pairs:
    np.testing.assert_array_equal(own, other)
  own, other = found.info.to_json(), INFO.to_json()
  assert json.dumps(own) == json.dumps(other)
  assert found.settings['dtype'] == 'bfloat16'
  fewer = Predictor.from_pretrained(folder, num_classes=2)
  assert fewer.info.mean == INFO.mean and fewer.info.bits == 16
  assert fewer(image).shape == (50, 70)
  merged, report = load_pretrained(str(folder), network[1], preset='timm')
  assert report.initial == {} and report.unused == {}
  stem = merged['params']['backbone']['stem']['kernel']
  np.testing.assert_array_equal(
    stem, network[1]['params']['backbone']['stem']['kernel']
  )


def changed(folder, **changes):
  config = json.loads((folder / 'config.json').read_text())
  for key, value in changes.items():
    *sections, name = key.split('__')
    place = config
    for section in sections:
      place = place[section]
    if value is None:
      del place[name]
    else:
      place[name] = value
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'format': 2}, 'format must be 1; is it newer.*got 2'),
    ({'format': None}, 'format'),
    ({'extra': 1}, r"must have the keys .*got \['extra'\]"),
    ({'model': [1]}, 'config.model must be like'),
    ({'model__width': None}, r"config.model must have .*got \['width'\]"),
    ({'model__width': '1'}, "config.model.width must be like 1.0, got '1'"),
    ({'model__width': float('nan')}, 'config.model.width must be like'),
    ({'model__width': 1e300}, 'config.model.width must be like'),
    (
      {'model__aspp_rates': [6, True]},
      'config.model.aspp_rates must be like 6',
    ),
    ({'model__aspp_rates': []}, 'aspp_rates must be numbers from 1'),
    ({'model__backbone': '../x'}, 'backbone must be one of'),
    ({'model__preset': 'x'}, 'preset must be one of'),
    ({'model__dtype': 'int8'}, 'dtype must be'),
    ({'model__decoder': 'x'}, 'decoder must be one of'),
    ({'dataset__classes': ['a', 1, 'c']}, 'classes must be like'),
    ({'dataset__classes': ['a', 'b', 'c', 'd']}, 'values must be one for each'),
    ({'dataset__values': [1, 2, 300]}, 'values must be one for each class'),
    ({'dataset__palette': [[0, 0, 256]] * 3}, 'values must be one for each'),
    ({'dataset__bits': 7}, 'bits must be 8 or 16'),
    ({'dataset__mean': [1.0]}, 'normalization must be that of data set or'),
    ({'normalization__std': [0.0] * 4}, 'normalization must be that of'),
    ({'dataset__ignore_label': -1}, 'config.dataset.ignore_label must be like'),
  ],
  ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(folder, changes, words):
  changed(folder, **changes)
  with pytest.raises(UserError, match=f'^{folder}/config.json: .*{words}') as e:
    open_pretrained(str(folder))
  assert '\n' not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'dataset__palette': [[0, 0]] * 3}, 'palette must be'),
    ({'dataset__palette': [[0], [0, 0], [1]]}, 'init_from=.*'),
    ({'dataset__ignore_label': 2}, 'ignore_label must be no class'),
    ({'dataset__classes': ['a', 'b\n', 'c']}, 'short and printable'),
    ({'model__backbone': 'resnet34'}, 'backbone'),
    ({'model__aspp_features': 9}, 'shape'),
    ({'model__width': 0.25}, 'shape'),
    ({'model__multi_grid': [0]}, 'multi_grid'),
    ({'model__output_stride': 7}, 'output_stride'),
  ],
  ids=str,
)
def test_what_the_classes_and_the_arrays_contradict_is_named(
  folder, changes, words
):
  changed(folder, **changes)
  with pytest.raises(UserError, match=words) as error:
    Predictor.from_pretrained(folder)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'text', ['', '{', '[' * 100_000, '[]', 'x' * 2**21, '{"library": 1}']
)
def test_a_damaged_config_is_one_line(folder, text):
  (folder / 'config.json').write_text(text)
  with pytest.raises(UserError) as error:
    open_pretrained(str(folder))
  assert str(folder) in str(error.value) and '\n' not in str(error.value)


def test_damaged_arrays_are_one_line(folder):
  path = folder / 'model.safetensors'
  arrays = safetensors.numpy.load_file(path)
  scalar = np.zeros((), np.float32)
  for key, words in (
    ('params/logits/bias', 'no class layer for 3 classes'),
    ('params/backbone/stem/kernel', 'of another shape'),
    ('opt_state/0', 'without a place in the network: opt_state/0'),
  ):
    safetensors.numpy.save_file({**arrays, key: scalar}, path)
    with pytest.raises(UserError, match=words) as error:
      Predictor.from_pretrained(folder)
    assert '\n' not in str(error.value)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match='truncated or damaged'):
    open_pretrained(str(folder))
  path.unlink()
  with pytest.raises(UserError, match=f'{path}'):
    open_pretrained(str(folder))


def test_what_could_not_be_read_is_not_written(network, tmp_path):
  settings = {**SETTINGS, 'backbone': 'mine.backbone'}
  with pytest.raises(UserError, match='cannot be published: backbone must be'):
    hub.write(tmp_path, '0.1.0', settings, INFO.to_json(), network[1])
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A hub that huggingface_hub asks, whose cache is a folder of the test."""
  from huggingface_hub import constants

  with hub_server.serving('') as running:
    url = f'{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}'
    monkeypatch.setattr(constants, 'ENDPOINT', running.address)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    yield running


def test_both_files_come_from_one_commit(server, folder):
  old, new = (
    {name: (folder / name).read_bytes() for name in (hub.CONFIG, hub.ARRAYS)}
    for _ in range(2)
  )
  server.repositories['someone/net'] = {'a' * 40: old, 'b' * 40: new}
  path = hub.fetch('hf://someone/net')
  assert path.name == 'b' * 40
  asked = [p for kind, p in server.requests if kind == 'GET' and 'resolve' in p]
  assert asked == [
    '/someone/net/resolve/main/config.json',
    f'/someone/net/resolve/{"b" * 40}/model.safetensors',
  ]
  assert Predictor.from_pretrained('hf://someone/net').info.name == 'bands'


@pytest.mark.parametrize('config', [None, b'{"architecture": "resnetv2_50"}'])
def test_weights_of_timm_come_with_a_config_of_theirs_or_without(
  server, config
):
  files = {hub.ARRAYS: b'theirs'}
  if config:
    files[hub.CONFIG] = config
  server.repositories['timm/net'] = {'c' * 40: files}
  assert hub.fetch('hf://timm/net').read_bytes() == b'theirs'


def test_a_hub_without_the_repository_is_one_line(server, monkeypatch):
  with pytest.raises(UserError, match=r'^hf://a/b cannot be fetched') as error:
    open_pretrained('hf://a/b')
  assert '\n' not in str(error.value) and 'name the folder' in str(error.value)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"pip install 'deeplab_jax\[hf\]'"):
    open_pretrained('hf://a/b')


def test_no_error_of_the_hub_shows_a_token(server, monkeypatch, folder):
  import huggingface_hub

  def refuse(*_, **__):
    raise RuntimeError("Illegal header value b'Bearer hf_secret\n'")

  monkeypatch.setattr(huggingface_hub, 'create_repo', refuse)
  with pytest.raises(UserError, match='Bearer') as error:
    hub.upload(folder, 'hf://a/b')
  assert 'secret' not in ''.join(traceback.format_exception(error.value))
