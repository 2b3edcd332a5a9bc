"""State dicts of torchvision and VainF: found by their names, or refused."""

import contextlib
import hashlib
import pickle
import re
import subprocess
import sys
import types
import venv
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import fill, torchvision_shapes
from safetensors.numpy import save_file

from deeplab_jax import PRESETS, Predictor, deeplab_v3, import_weights
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights import torchvision
from deeplab_jax.weights.load import load_pretrained, open_pretrained
from deeplab_jax.weights.mapping import flatten
from deeplab_jax.weights.torchvision import read_torch

pytestmark = pytest.mark.compiles

BASE, ROOT = 4, Path(__file__).parents[2]
HEADS = 'torchvision', 'vainf', 'v3plus'


def arrays_of(head='torchvision', prefix=''):
  shapes = torchvision_shapes(head, BASE, classes=5)
  return {f'{prefix}{name}': x for name, x in fill(shapes).items()}


def empty(settings, classes=5, **more):
  """Variables of zeros of a network with the settings of a source."""
  model = deeplab_v3(
    **{**settings, 'num_classes': classes, 'aspp_features': 256, **more}
  )
  images = np.zeros((1, 33, 33, 3))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)
  )
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.'])
@pytest.mark.parametrize('head', HEADS)
def test_every_array_of_a_segmenter_finds_its_place(tmp_path, head, prefix):
  arrays = arrays_of(head, prefix)
  arrays[f'{prefix}backbone.bn1.num_batches_tracked'] = np.array(3)
  save_file(arrays, tmp_path / 'x.safetensors')
  source = open_pretrained(str(tmp_path / 'x.safetensors'))
  plus, own = head == 'v3plus', head == 'torchvision'
  assert source.presets == (('torchvision',) if own else ('vainf',))
  assert source.settings == {
    'backbone': 'resnet50_v1',
    'width': BASE / 64,
    'aspp_features': 256,
    'multi_grid': (1, 1, 1),
    'aspp_rates': (12, 24, 36) if own else (6, 12, 18),
    'decoder': 'v3plus' if plus else 'conv',
  }
  variables, report = source.merge_into(
    empty(source.settings, preset=source.presets[0], auxiliary=own)
  )
  assert not report.initial and len(report.loaded) == len(arrays) - 1
  assert set(report.unused.values()) == {'state of the training'}
  assert all(x.all() for x in flatten(variables).values())


def test_image_pooling_moves_to_where_this_network_joins_it(tmp_path):
  arrays = arrays_of()
  name = 'classifier.0.project.0.weight'
  arrays[name][:, 4 * 256 :] = 7  # reads the pooling, which comes last there
  save_file(arrays, tmp_path / 'x.safetensors')
  source = open_pretrained(str(tmp_path / 'x.safetensors'))
  kernel = source.arrays['params/aspp/project/conv/kernel'][0, 0]
  assert (kernel[:256] == 7).all()
  np.testing.assert_array_equal(kernel[256:], arrays[name][:, :1024, 0, 0].T)


def test_imagenet_weights_go_under_any_head_of_their_presets(tmp_path):
  save_file(arrays_of(''), tmp_path / 'x.safetensors')
  path = str(tmp_path / 'x.safetensors')
  source = open_pretrained(path)
  assert source.presets == ('vainf', 'torchvision')
  assert source.settings == {'backbone': 'resnet50_v1', 'width': BASE / 64}
  for preset in source.presets:
    empties = empty(source.settings, preset=preset, decoder='v3plus')
    _, report = load_pretrained(path, empties, preset=preset)
    assert all('/backbone/' in name for name in report.loaded)
    assert {name.split('/')[1] for name in report.initial} == {
      *('aspp', 'decoder', 'logits')
    }
    assert set(report.unused) == {'fc.weight', 'fc.bias'}


def test_other_classes_keep_all_but_the_class_layers(tmp_path):
  save_file(arrays_of(), tmp_path / 'x.safetensors')
  source = open_pretrained(str(tmp_path / 'x.safetensors'))
  empties = empty(source.settings, 9, preset='torchvision', auxiliary=True)
  variables, report = source.merge_into(empties)
  assert sorted(report.initial) == [
    f'params/{head}logits/{leaf}'
    for head in ('auxiliary/', '')
    for leaf in ('bias', 'kernel')
  ]
  assert variables['params']['decoder']['conv']['conv']['kernel'].all()


def test_a_damaged_auxiliary_head_is_named_if_it_is_wanted(tmp_path):
  arrays = arrays_of()
  del arrays['aux_classifier.1.running_var']
  save_file(arrays, tmp_path / 'x.safetensors')
  source = open_pretrained(str(tmp_path / 'x.safetensors'))
  empties = empty(source.settings, preset='torchvision')
  _, report = source.merge_into(empties)
  assert 'the network has no auxiliary head' in report.unused.values()
  empties = empty(source.settings, preset='torchvision', auxiliary=True)
  with pytest.raises(UserError, match='missing in the file: batch_stats/aux'):
    source.merge_into(empties)


@pytest.mark.parametrize(
  ('head', 'stride'), [('', 16), ('vainf', 16), ('torchvision', 8)]
)
def test_without_a_recipe_the_preset_gives_head_and_stride(
  tmp_path, head, stride
):
  path = tmp_path / 'x.safetensors'
  save_file(arrays_of(head), path)
  model = import_weights.config_of(str(path)).model
  preset = PRESETS['torchvision' if head == 'torchvision' else 'vainf']
  for key in ('multi_grid', 'aspp_rates', 'decoder'):
    assert model[key] == preset[key]
  assert model.output_stride == stride


def refused(path):
  """The one line that says why."""
  with pytest.raises(UserError) as error:
    source = open_pretrained(str(path))
    source.merge_into(empty(source.settings, preset=source.presets[0]))
  message = str(error.value)
  assert '\n' not in message and str(path) in message
  return message


def without(name):
  return lambda arrays: arrays.pop(name)


def changed(name, change):
  return lambda arrays: arrays.update({name: change(arrays[name])})


LOGITS, STEM = 'classifier.4.weight', 'backbone.conv1.weight'
RUNNING = 'backbone.layer3.5.bn2.running_var'


@pytest.mark.parametrize(
  ('mutate', 'words'),
  [
    (without(STEM), 'missing in the file: params/backbone/stem/kernel'),
    (without(LOGITS), 'missing in the file: params/logits/kernel'),
    (
      without(RUNNING),
      'missing in the file: batch_stats/backbone/block3/unit6',
    ),
    (without('classifier.1.weight'), 'missing in the file: params/decoder'),
    (without('classifier.0.convs.2.0.weight'), 'missing in the file'),
    (without('backbone.layer2.0.downsample.1.bias'), 'shortcut_norm/bias'),
    (lambda a: a.update(x=np.ones(3)), 'without a place in the network: x'),
    (
      lambda a: a.update({'backbone.layer1.3.conv1.weight': a[STEM]}),
      'without a place in the network: ',
    ),
    (
      lambda a: a.update({f'module.{STEM}': a[STEM]}),
      'both go to params/backbone/stem/kernel',
    ),
    (
      lambda a: a.update({'classifier.9.weight': a[LOGITS]}),
      'without a place in the network: classifier.9.weight',
    ),
    (changed(LOGITS, lambda x: x[:, :9]), 'of another shape: params/logits'),
    (changed(LOGITS, lambda x: x[..., 0]), 'of another shape: params/logits'),
    (changed(STEM, lambda x: x[:, :, :3]), 'of another shape: params/backbone'),
    (changed(RUNNING, lambda x: x[:1]), 'of another shape: batch_stats'),
    (changed(RUNNING, lambda x: x * np.nan), 'not finite: batch_stats'),
    (changed(LOGITS, lambda x: x * np.float32(np.inf)), 'not finite: params'),
    (changed(STEM, lambda x: x.astype(int)), 'holds int64, not floating'),
    (changed(RUNNING, lambda x: x > 0), 'holds bool, not floating'),
    (changed(RUNNING, lambda x: -x), 'below zero: batch_stats/backbone'),
    (
      changed(STEM, lambda x: np.array(x.flat[0])),
      'of another shape: params/back',
    ),
    (
      changed('classifier.0.project.0.weight', lambda x: np.array(x.flat[0])),
      'of another shape: params/aspp/project',
    ),
    (
      lambda a: a.update(
        {f'backbone.layer1.{"9" * 5000}.conv1.weight': a[STEM]}
      ),
      'without a place in the network: backbone.layer1.999',
    ),
    (lambda a: a.clear(), 'missing in the file'),
    (
      lambda a: [a.pop(k) for k in list(a) if k.startswith('classifier.0.')],
      '30 arrays missing in the file: batch_stats/aspp',
    ),
    (without('classifier.4.bias'), 'missing in the file: params/logits/bias'),
    (
      lambda a: [a.pop(k) for k in list(a) if k.startswith('backbone.')],
      'missing in the file: ',
    ),
  ],
)
def test_mutated_files_end_in_one_line(tmp_path, mutate, words):
  arrays = arrays_of()
  mutate(arrays)
  path = tmp_path / 'x.safetensors'
  save_file(arrays, path)
  assert words in refused(path)


def test_types_that_numpy_lacks_are_refused(tmp_path):
  path = tmp_path / 'x.safetensors'
  header = b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + b'\x00')
  assert 'is truncated or damaged, or of unknown type: module' in refused(path)


def test_a_source_that_changes_is_read_again(tmp_path):
  path = tmp_path / 'x.safetensors'
  for value in (1, 2):  # twice 21 classes, those of PASCAL VOC
    shapes = torchvision_shapes('torchvision', BASE, classes=21)
    arrays = fill(shapes)
    arrays['classifier.4.bias'][:] = value
    save_file(arrays, path)
    found = import_weights.open_network(str(path), None)
    assert (found['variables']['params']['logits']['bias'] == value).all()


@pytest.mark.parametrize('count', [5, 300])
def test_classes_that_nobody_names_have_numbers(tmp_path, count):
  path = tmp_path / 'x.safetensors'
  save_file(fill(torchvision_shapes('torchvision', BASE, classes=count)), path)
  config = import_weights.config_of(str(path))
  if count > 255:
    with pytest.raises(
      UserError, match='num_classes must be 1 to 255, got 300'
    ):
      import_weights.import_weights(config, tmp_path / 'w')
    return
  import_weights.import_weights(config, tmp_path / 'w')
  found = Predictor.from_workdir(tmp_path / 'w')
  assert found.info.classes == tuple(f'class {i}' for i in range(5))
  bias = found.variables['params']['logits']['bias']
  np.testing.assert_array_equal(bias, arrays_of()['classifier.4.bias'])


class Tensor(np.ndarray):
  """What `read_torch` needs of a tensor of torch."""

  def is_floating_point(self):
    return self.dtype.kind == 'f'

  def float(self):
    return self.astype(np.float32)

  def numpy(self, *, force):
    assert force
    return np.asarray(self)


def tensor(*values):
  return np.array(values).view(Tensor)


@pytest.fixture
def torch_gives(monkeypatch, tmp_path):
  """Lets a module in the place of torch give what a file holds."""

  def give(state):
    def load(path, *, map_location, weights_only):
      assert weights_only and map_location == 'cpu'
      if isinstance(state, Exception):
        raise state
      return state

    fake = types.SimpleNamespace(
      Tensor=Tensor,
      load=load,
      serialization=types.SimpleNamespace(
        safe_globals=lambda found: contextlib.nullcontext()
      ),
    )
    monkeypatch.setitem(sys.modules, 'torch', fake)
    return tmp_path / 'x.pth'

  return give


@pytest.mark.parametrize(
  'wrap',
  [
    lambda state: state,
    lambda state: {'model_state': state, 'best_score': 0.7},
    lambda state: {'epoch': 3, 'state_dict': state},
    lambda state: {'model': {'state_dict': state}},
  ],
)
def test_a_state_dict_is_found_in_a_checkpoint(torch_gives, wrap):
  path = torch_gives(wrap({'a.weight': tensor(0.5), 'n': tensor(3)}))
  found = read_torch(path)
  assert found == {'a.weight': np.float32(0.5), 'n': 3}
  assert found['a.weight'].dtype == np.float32


@pytest.mark.parametrize(
  ('state', 'words'),
  [
    ({'a': tensor(1.0), 'lr': 0.1}, 'lr is no tensor, but of type float'),
    ({'a': [tensor(1.0)]}, 'a is no tensor, but of type list'),
    ({}, 'holds no state dict, but dict'),
    ([tensor(1.0)], 'holds no state dict, but list'),
    (tensor(1.0), 'holds no state dict, but Tensor'),
    (pickle.UnpicklingError('x'), 'holds more than tensors'),
    (RuntimeError('PytorchStreamReader\nfailed'), 'PytorchStreamReader'),
  ],
)
def test_what_is_no_state_dict_is_refused(torch_gives, state, words):
  path = torch_gives(state)
  with pytest.raises(UserError, match=words) as error:
    read_torch(path)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_published_weights_are_asked_for_by_name(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  save_file(arrays_of(), tmp_path / 'x')
  content = (tmp_path / 'x').read_bytes()
  digest = hashlib.sha256(content).hexdigest()[:8]
  url = f'http://127.0.0.1:9/x-{digest}.pth'  # nobody listens there
  name = 'deeplabv3_resnet50'
  monkeypatch.setitem(torchvision.PUBLISHED, name, (url, digest))
  with pytest.raises(UserError, match=f'cannot be downloaded: {url}'):
    open_pretrained(f'torchvision/{name}')
  cached = tmp_path / 'deeplab_jax' / f'x-{digest}.pth'
  cached.write_bytes(content)
  assert open_pretrained(f'torchvision/{name}').presets == ('torchvision',)
  cached.write_bytes(content[:-1])
  with pytest.raises(UserError, match='cannot be downloaded'):
    open_pretrained(f'torchvision/{name}')
  with pytest.raises(UserError, match='not for fcn_resnet50'):
    open_pretrained('torchvision/fcn_resnet50')


def test_addresses_carry_the_digest_that_is_checked():
  for url, digest in torchvision.PUBLISHED.values():
    assert re.fullmatch(rf'https://.+-{digest}\.pth', url)
    assert re.fullmatch('[0-9a-f]{8}', digest)


TORCH = """
import sys
import numpy as np
import torch
from deeplab_jax import deeplab_v3
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.weights.load import open_pretrained

folder, arrays = sys.argv[1], dict(np.load(sys.argv[2]))
state = {name: torch.tensor(x) for name, x in arrays.items()}
state['backbone.bn1.num_batches_tracked'] = torch.tensor(3)
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
vainf = {
  'cur_itrs': 30000,
  'model_state': {f'module.{name}': x for name, x in state.items()},
  'optimizer_state': optimizer.state_dict(),
  'best_score': np.float64(0.7),
}
expected = open_pretrained(f'{folder}/x.safetensors').arrays
for name, saved, options in (
  ('plain', state, {}),
  ('old', state, {'_use_new_zipfile_serialization': False}),
  ('vainf', vainf, {}),
  ('half', {name: x.bfloat16() for name, x in state.items()}, {}),
):
  torch.save(saved, f'{folder}/{name}.pth', **options)
  found = open_pretrained(f'{folder}/{name}.pth').arrays
  assert found.keys() == expected.keys()
  for path, x in found.items():
    np.testing.assert_allclose(x, expected[path], rtol=4e-3 * (name == 'half'))
content = open(f'{folder}/plain.pth', 'rb').read()
open(f'{folder}/short.pth', 'wb').write(content[:len(content) // 2])
torch.save(layer, f'{folder}/module.pth')
for name in ('short', 'module'):
  try:
    open_pretrained(f'{folder}/{name}.pth')
  except UserError as error:
    print(error)
  else:
    raise SystemExit(f'{name} was read')
"""


@pytest.mark.slow
def test_files_of_torch_itself_are_read(tmp_path, monkeypatch):
  """Writes and reads them in a new environment with torch."""
  for name in ('HOME', 'TMPDIR'):  # pip and torch leave files there
    monkeypatch.setenv(name, str(tmp_path))
  arrays = arrays_of()
  save_file(arrays, tmp_path / 'x.safetensors')
  np.savez(tmp_path / 'x.npz', **arrays)
  venv.create(tmp_path / 'env', with_pip=True)
  python = tmp_path / 'env/bin/python'
  pip = [python, '-m', 'pip', 'install', '-q', str(ROOT), 'torch==2.13.0']
  subprocess.run(pip, check=True)
  command = [python, '-c', TORCH, tmp_path, tmp_path / 'x.npz']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  short, module = done.stdout.splitlines()
  assert 'truncated or damaged' in short
  assert 'holds more than tensors' in module
