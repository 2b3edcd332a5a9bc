"""Artifacts, loaded again and compared with the Predictor."""

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import jax
import jax.export
import numpy as np
import onnxruntime
import pytest
from miniature import make_config
from PIL import Image

from deeplab_jax import deeplab_v3
from deeplab_jax.data.images import read_image
from deeplab_jax.export import Exportable, export, write_stablehlo
from deeplab_jax.predict import Predictor
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/export.md').read_text()
CAMVID = ROOT.parent / 'shared/data/camvid/JPEGImages'
SIZES = ((65, 97), (66, 80), (7, 33))


def drawn(size, batch=1):
  rng = np.random.default_rng(size)
  return rng.integers(0, 256, (batch, *size, 3), np.uint8)


def runner(folder):
  """Function (images) -> results of an artifact, as its users load it."""
  if (folder / 'model.stablehlo').exists():
    data = (folder / 'model.stablehlo').read_bytes()
    return jax.export.deserialize(bytearray(data)).call
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  session = onnxruntime.InferenceSession(
    folder / 'model.onnx', options, providers=['CPUExecutionProvider']
  )
  names = [output.name for output in session.get_outputs()]
  return lambda images: dict(
    zip(names, session.run(names, {'images': images}), strict=True)
  )


def assert_like(found, probabilities, what, bound=1e-3, share=0.999):
  """Compares results for one image with the Predictor's probabilities."""
  found = {key: np.asarray(value)[0] for key, value in found.items()}
  difference = np.abs(found['probabilities'] - probabilities).max()
  equal = (found['segmentation_map'] == probabilities.argmax(-1)).mean()
  print(f'{what}: {difference:.1e} at most, {equal:.4%} of the classes equal')
  assert found['segmentation_map'].dtype == np.uint8
  assert difference < bound
  assert equal >= share


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
  """Function (format, key=value...) -> folder and what was printed."""
  done = {}

  def run(kind, **changes):
    key = kind, *sorted(changes.items())
    if key not in done:
      folder = tmp_path_factory.mktemp('exports') / kind
      changes = {f'export__{name}': value for name, value in changes.items()}
      config = make_config(
        trained.settings,
        export__format=kind,
        export__output_dir=str(folder),
        **changes,
      )
      done[key] = export(config, trained.workdir)
    return done[key]

  return run


@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
def test_an_artifact_gives_what_the_predictor_gives_at_any_size(
  trained, exported, kind
):
  run = runner(exported(kind, probabilities=True))
  predictor = Predictor.from_workdir(trained.workdir)
  for size in SIZES:
    images = drawn(size, batch=2)
    found = run(images)
    for i, image in enumerate(images):
      labels, probabilities = predictor(image, probabilities=True)
      assert np.array_equal(labels, probabilities.argmax(-1))
      own = {key: np.asarray(value)[i : i + 1] for key, value in found.items()}
      assert_like(own, probabilities, f'{kind} {size}')


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f'no {CAMVID}')
@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
def test_an_artifact_gives_what_the_predictor_gives_on_photos(
  trained, exported, kind
):
  run = runner(exported(kind, probabilities=True))
  predictor = Predictor.from_workdir(trained.workdir)
  paths = sorted(CAMVID.iterdir())[:3]
  sizes = (1.0, 0.7, 0.51)
  for path, scale in zip(paths, sizes, strict=True):
    picture = Image.fromarray(read_image(path))
    size = [round(scale * n) for n in picture.size]
    image = np.asarray(picture.resize(size))
    _, probabilities = predictor(image, probabilities=True)
    assert_like(run(image[None]), probabilities, f'{kind} {path.name} {size}')


@pytest.mark.parametrize(
  ('backbone', 'preset', 'stride', 'decoder'),
  [
    ('resnet50', 'seed', 8, 'none'),
    ('resnet18', 'keras', 32, 'none'),
    ('resnet18', 'timm', 16, 'none'),
    ('resnet18', 'paper', 16, 'v3plus'),
    ('resnet50_v1', 'torchvision', 8, 'conv'),
    ('resnet18_v1', 'vainf', 16, 'v3plus'),
  ],
)
def test_every_network_is_exported_for_any_size_by_convolutions_of_xla(
  random_variables, tmp_path, backbone, preset, stride, decoder
):
  model = deeplab_v3(
    backbone,
    num_classes=5,
    output_stride=stride,
    preset=preset,
    width=0.125,
    aspp_features=8,
    decoder=decoder,
  )
  variables = random_variables(model)
  network = Exportable(model, variables, probabilities=True)
  run = write_stablehlo(network, tmp_path)
  data = (tmp_path / 'model.stablehlo').read_bytes()
  artifact = jax.export.deserialize(bytearray(data))
  assert artifact.platforms == ('cpu', 'cuda', 'tpu')
  b, h, w = artifact.out_avals[-1].shape
  assert artifact.in_avals[0].shape == (b, h, w, 3)
  kernels = [x for x in jax.tree.leaves(variables) if x.ndim == 4]
  convolutions = re.findall(r'stablehlo\.convolution\b', artifact.mlir_module())
  assert len(convolutions) == len(kernels) * len(artifact.platforms)
  batches = [drawn(size) for size in SIZES[1:]]
  apply = functools.partial(model.apply, train=False)
  expected = jax.jit(lambda v, x: [apply(v, images) for images in x])
  for images, logits in zip(batches, expected(variables, batches), strict=True):
    probabilities = np.asarray(jax.nn.softmax(logits))[0]
    assert_like(run(images), probabilities, f'{preset} {images.shape}')


def test_a_fixed_size_and_one_platform(trained, exported):
  folder = exported('stablehlo', size=(40, 56), platforms=('cpu',))
  data = (folder / 'model.stablehlo').read_bytes()
  artifact = jax.export.deserialize(bytearray(data))
  assert artifact.platforms == ('cpu',)
  variables = Predictor.from_workdir(trained.workdir).variables
  kernels = [x for x in jax.tree.leaves(variables) if x.ndim == 4]
  assert artifact.mlir_module().count('stablehlo.convolution(') == len(kernels)
  assert artifact.in_avals[0].shape[1:] == (40, 56, 3)
  found = artifact.call(drawn((40, 56), 3))
  assert found.keys() == {'segmentation_map'}
  assert found['segmentation_map'].shape == (3, 40, 56)
  with pytest.raises(ValueError, match='40'):
    artifact.call(drawn((41, 56)))


@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_kernels_of_16_bits_take_half_the_space(exported, kind, dtype):
  name = f'model.{kind}'
  whole = (exported(kind, probabilities=True) / name).stat().st_size
  folder = exported(kind, dtype=dtype)
  assert (folder / name).stat().st_size < 0.65 * whole
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['kernels'] == dtype
  assert 0 <= manifest['compared']['largest_preference'] < 0.05


@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
def test_the_manifest_says_what_the_numbers_mean(trained, exported, kind):
  folder = exported(kind, probabilities=True)
  manifest = json.loads((folder / 'manifest.json').read_text())
  names = {path.name for path in folder.iterdir()}
  assert names == {'manifest.json', f'model.{kind}'}
  data = (folder / f'model.{kind}').read_bytes()
  assert manifest['sha256'] == {
    f'model.{kind}': hashlib.sha256(data).hexdigest()
  }
  dataset = manifest['dataset']
  assert dataset['classes'] == ['ground', 'left', 'right', 'absent']
  assert dataset['palette'][1] == [200, 0, 0]
  assert dataset['ignore_label'] == 255
  assert manifest['normalization']['mean'] == [127.5] * 3
  assert manifest['versions']['jax'] == jax.__version__
  assert manifest['checkpoint']['step'] in (2, 4, 6)
  assert 0 <= manifest['checkpoint']['metrics']['miou'] <= 1
  assert manifest['outputs']['probabilities'] == 'float32 [B, H, W, C]'
  assert manifest['compared']['equal_classes'] > 0.999
  assert manifest['compared']['largest_difference'] < 1e-3
  assert ('6 months' in manifest['loads_in']) == (kind == 'stablehlo')


def test_the_loader_of_the_page_needs_jax_alone(trained, exported, tmp_path):
  code = PAGE.split('## StableHLO')[1].split('```python\n')[1].split('```')[0]
  assert len(code.split('\n\n\n')[1].splitlines()) <= 15
  folder, path = exported('stablehlo'), tmp_path / 'images.npy'
  images = drawn((50, 70), 2)
  np.save(path, images)
  program = (
    'import sys, numpy as np\n'
    f'images = np.load({str(path)!r})\n'
    + code.replace('EXPORTED', str(folder))
    + f'\nnp.save({str(path)!r}, classes)\n'
    "print(*found, '|', *{m.partition('.')[0] for m in sys.modules})"
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  names, _, modules = done.stdout.partition('|')
  assert not {'deeplab_jax', 'flax', 'tensorflow'} & set(modules.split())
  assert set(names.split()) <= {'ground', 'left', 'right', 'absent'}
  predictor = Predictor.from_workdir(trained.workdir)
  expected = np.stack([predictor(image) for image in images])
  assert (np.load(path) == expected).mean() > 0.999


def test_differences_are_printed(trained, tmp_path, capsys):
  config = make_config(
    trained.settings, export__format='onnx', export__probabilities=True
  )
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained.workdir, workdir)
  folder = export(config, workdir)
  assert folder == workdir / 'export' / 'onnx'
  assert [path.name for path in folder.parent.iterdir()] == ['onnx']
  number = r'[\d.]+(e-\d\d)?'
  assert re.fullmatch(
    rf'step \d as onnx in {folder}\n'
    'any size, float32 kernels; compared with the Predictor:\n'
    rf'equal classes (1|0\.999\d*), largest preference {number}, largest'
    rf' difference {number}\n',
    capsys.readouterr().out,
  )
  with pytest.raises(UserError, match=rf'{folder} exists; remove it'):
    export(config, workdir)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'format': 'tflite'}, 'format must be one of stablehlo, savedmodel, onnx'),
    ({'dtype': 'int8'}, 'dtype must be one of float32, float16, bfloat16'),
    ({'size': (33,)}, r'size must be height,width from 1, .* got \(33,\)'),
    ({'size': (0, 33)}, r'size must be height,width from 1'),
    ({'platforms': ('cpu', 'npu')}, 'platforms must be one of cpu, .*npu'),
    ({'platforms': ('rocm',)}, r'platforms must include (cpu|cuda|tpu), where'),
  ],
)
def test_impossible_settings_are_refused(trained, tmp_path, changes, words):
  changes = {f'export__{name}': value for name, value in changes.items()}
  config = make_config(trained.settings, **changes)
  with pytest.raises(UserError, match=f'^config.export: {words}'):
    export(config, tmp_path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('kind', 'package', 'install'),
  [
    ('onnx', 'onnxruntime', r"'deeplab_jax\[onnx\]'"),
    ('savedmodel', 'tensorflow', r"'deeplab_jax\[tf\]'"),
  ],
)
def test_a_missing_package_is_named(
  trained, tmp_path, monkeypatch, kind, package, install
):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    'importlib.util.find_spec',
    lambda name: None if name == package else find(name),
  )
  config = make_config(trained.settings, export__format=kind)
  words = (
    rf'config\.export\.format={kind} needs {package}: pip install {install}'
  )
  with pytest.raises(UserError, match=f'^{words}$'):
    export(config, tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_workdir_without_a_checkpoint_is_named(trained, tmp_path):
  with pytest.raises(UserError, match='no checkpoint in'):
    export(make_config(trained.settings), tmp_path)
  assert not (tmp_path / 'export').exists()


def test_what_fails_leaves_nothing(trained, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('deeplab_jax.export.compare', fail)
  folder = tmp_path / 'out'
  config = make_config(
    trained.settings, export__format='onnx', export__output_dir=str(folder)
  )
  with pytest.raises(UserError, match=rf'^{folder}: No space left on device$'):
    export(config, trained.workdir)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_savedmodel_works_in_tensorflow_alone(trained, tmp_path, monkeypatch):
  """Exports and loads in two new environments; prints the differences."""
  # pip, and rustc, which it asks for its version, leave files there.
  monkeypatch.setenv('HOME', str(tmp_path))
  images = drawn((50, 70), 2)
  pngs = []
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f'{i}.png')
    pngs.append(str(tmp_path / f'{i}.png'))
  np.save(tmp_path / 'images.npy', images)
  folder = tmp_path / 'savedmodel'
  both = {'ours': f'{ROOT}[tf]', 'alone': 'tensorflow'}
  pythons = {}
  for name, package in both.items():
    venv.create(tmp_path / name, with_pip=True)
    pythons[name] = str(tmp_path / name / 'bin/python')
    pip = [pythons[name], '-m', 'pip', 'install', '-q', package]
    subprocess.run(pip, check=True)
  done = subprocess.run(
    [
      *(pythons['ours'], '-m', 'deeplab_jax.main', '--mode=export'),
      f'--workdir={trained.workdir}',
      '--config.export.format=savedmodel',
      '--config.export.probabilities=True',
      f'--config.export.output_dir={folder}',
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  print(done.stdout)
  code = PAGE.split('## TensorFlow')[1].split('```python\n')[1].split('```')[0]
  program = (
    'import numpy as np\nimport sys\n'
    f'images = np.load({str(tmp_path / "images.npy")!r})\n'
    + code.replace('EXPORTED', str(folder))
    + f'\nfiles = [open(p, "rb").read() for p in {pngs!r}]\n'
    "by_bytes = network.signatures['predict_bytes'](\n"
    "    image_bytes=tf.constant(files))['segmentation_map']\n"
    'assert np.array_equal(by_bytes, result)\n'
    'default = network.signatures["serving_default"](tf.constant(images))\n'
    f'np.savez({str(tmp_path / "found.npz")!r},\n'
    '  **{k: v.numpy() for k, v in default.items()})\n'
    'assert "jax" not in sys.modules\n'
  )
  done = subprocess.run(
    [pythons['alone'], '-c', program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  found = dict(np.load(tmp_path / 'found.npz'))
  predictor = Predictor.from_workdir(trained.workdir)
  for i, image in enumerate(images):
    _, probabilities = predictor(image, probabilities=True)
    own = {key: value[i : i + 1] for key, value in found.items()}
    assert_like(own, probabilities, 'savedmodel')
