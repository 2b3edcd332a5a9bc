"""Images of four bands of 16 bits, through all that a person can run."""

import dataclasses
import io
import json
import logging
import types

import jax
import numpy as np
import onnxruntime  # noqa: F401  here, since it writes a file when it is imported
import pytest
from miniature import (
  SETTINGS,
  make,
  make_config,
  share_programs,
)
from PIL import Image

from deeplab_jax import Predictor, build, deeplab_v3
from deeplab_jax.benchmark import measure
from deeplab_jax.configure import from_json
from deeplab_jax.data.datasets import DatasetInfo, voc_palette
from deeplab_jax.evaluate import evaluate
from deeplab_jax.evaluation import windows
from deeplab_jax.export import export
from deeplab_jax.import_weights import (
  config_of,
  import_weights,
  initialize,
)
from deeplab_jax.predict_files import predict
from deeplab_jax.prepare import prepare
from deeplab_jax.runtime.errors import UserError
from deeplab_jax.train import train_and_evaluate
from deeplab_jax.training import steps
from deeplab_jax.weights import networks
from deeplab_jax.weights.load import Pretrained, input_std
from deeplab_jax.weights.mapping import NameMap, adapt_stem, flatten

pytestmark = pytest.mark.compiles

STEM = 'params/backbone/stem/kernel'


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Each program of these runs is traced once."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


def write_bands(root, counts):
  """A folder whose images are arrays of four bands of their own ranges."""
  rng = np.random.default_rng(0)
  for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
    (root / part).mkdir(parents=True)
  (root / 'classes.txt').write_text('ground\nleft\nright\n')
  for split, count in counts.items():
    names = [f'{split}_{i}' for i in range(count)]
    lists = root / 'ImageSets/Segmentation'
    (lists / f'{split}.txt').write_text('\n'.join(names))
    for name in names:
      image = rng.integers(0, [4000, 900, 60_000, 300], (48, 40, 4))
      label = rng.integers(0, 3, (48, 40)).astype(np.uint8)
      np.save(root / f'JPEGImages/{name}.npy', image.astype(np.uint16))
      Image.fromarray(label).save(root / f'SegmentationClass/{name}.png')
  return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of two steps: folder, workdir and settings."""
  root = tmp_path_factory.mktemp('bands')
  folder = write_bands(root / 'mini', {'train': 4, 'val': 2})
  settings = {
    **SETTINGS,
    'data.dir': str(folder),
    'data.prepared_dir': str(root / 'prepared'),
    'data.as_stored': True,
    'data.color_jitter': (0.2, 0.2, 0.0, 0.0),
    'data.eval_split': '',
    'train.steps': 2,
  }
  workdir = root / 'workdir'
  workdir.mkdir()
  train_and_evaluate(make_config(settings), workdir)
  return types.SimpleNamespace(
    folder=folder, workdir=workdir, settings=settings
  )


def read_all(folder, split):
  names = (folder / f'ImageSets/Segmentation/{split}.txt').read_text().split()
  return [np.load(folder / f'JPEGImages/{name}.npy') for name in names]


def test_the_mean_and_std_of_the_training_images_normalize(run):
  predictor = Predictor.from_workdir(run.workdir)
  pixels = np.concatenate(
    [x.reshape(-1, 4) for x in read_all(run.folder, 'train')]
  )
  np.testing.assert_allclose(predictor.model.mean, pixels.mean(0), rtol=1e-9)
  np.testing.assert_allclose(predictor.model.std, pixels.std(0), rtol=1e-9)
  assert flatten(predictor.variables)[STEM].shape[2] == 4
  # Evaluation opens val alone, whose mean is another one.
  dataset = build.open_dataset(make_config(run.settings), 'val')
  assert dataset.info.mean != predictor.info.mean
  config = make_config(run.settings, data__eval_split='val')
  padded, make = [], build.make_evaluator

  def made(model, data, config):
    padded.append(data.info.fill.tolist())
    return make(model, data, config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'make_evaluator', made)
    assert 0 < evaluate(config, run.workdir)['miou'] < 1
  assert padded == [predictor.info.fill.tolist()]


def test_prepare_says_what_it_measured_and_draws_it(run, tmp_path, capsys):
  prepare(make_config(run.settings), tmp_path)
  assert 'images of 4 channels of 16 bits, mean' in capsys.readouterr().out
  assert (tmp_path / 'prepare/train.png').stat().st_size > 10_000


def test_a_batch_holds_what_the_files_hold(run):
  config = make_config(run.settings, data__scale=(1.0, 1.0), data__flip=0.0)
  config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
  dataset = build.open_dataset(config, 'train')
  batches = build.make_iterator(config, dataset)
  image = next(batches)['image']
  batches.close()
  assert image.dtype == np.uint16 and image.shape == (4, 33, 33, 4)
  found = read_all(run.folder, 'train')
  for crop in image:  # it is a window of some image
    assert any((x == crop[0, 0]).all(-1).any() for x in found)


@pytest.mark.parametrize('place', ['', 'checkpoints', 'checkpoints/2'])
def test_a_workdir_and_what_is_in_it_open_as_pretrained(run, place):
  found = Predictor.from_pretrained(run.workdir / place)
  expected = Predictor.from_workdir(run.workdir)
  assert found.step == 2 and found.model.mean == expected.model.mean
  image = read_all(run.folder, 'val')[0]
  np.testing.assert_array_equal(found(image), expected(image))


def test_a_workdir_is_imported_with_its_bands_and_settings_of_data(
  run, tmp_path
):
  config = config_of(str(run.workdir))
  config.model.output_stride = run.settings['model.output_stride']
  import_weights(config, tmp_path)
  found, expected = map(Predictor.from_workdir, (tmp_path, run.workdir))
  image = read_all(run.folder, 'val')[0]
  np.testing.assert_array_equal(found(image), expected(image))
  data = from_json(tmp_path / 'config.json').data
  assert data == from_json(run.workdir / 'config.json').data


def test_files_and_arrays_are_segmented_alike(run, tmp_path):
  config = make_config(run.settings, predict__output_dir=str(tmp_path))
  masks = predict(config, run.workdir, [str(run.folder / 'JPEGImages')])
  predictor, path = Predictor.from_workdir(run.workdir), None
  assert len(masks) == 6
  for path in sorted((run.folder / 'JPEGImages').iterdir())[:2]:
    expected = np.asarray(Image.open(tmp_path / f'{path.stem}.png'))
    for image in (np.load(path), path, path.read_bytes()):
      np.testing.assert_array_equal(predictor(image), expected)
  with pytest.raises(UserError, match=r'uint16 \[H, W, 4\] .* got uint8'):
    predictor(np.zeros((40, 40, 4), np.uint8))


@pytest.mark.slow
def test_large_images_are_segmented_in_windows(run):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 4000, (640, 100, 4)).astype(np.uint16)
  predictor = Predictor.from_workdir(run.workdir, window=592)
  whole = Predictor.from_workdir(run.workdir)
  assert (predictor(image) == whole(image)).mean() > 0.99


@pytest.mark.parametrize(
  'kind', ['onnx', pytest.param('stablehlo', marks=pytest.mark.slow)]
)
def test_an_artifact_takes_the_same_images(run, tmp_path, kind):
  config = make_config(
    run.settings,
    export__format=kind,
    export__probabilities=True,
    export__output_dir=str(tmp_path / kind),
  )
  manifest = json.loads(
    (export(config, run.workdir) / 'manifest.json').read_text()
  )
  assert manifest['inputs'] == {'images': 'uint16 as stored [B, H, W, 4]'}
  assert manifest['compared']['largest_difference'] < 1e-4


def test_serving_reads_arrays_and_names_what_it_takes(run):
  serve = pytest.importorskip('deeplab_jax.serve')
  info = Predictor.from_workdir(run.workdir).info
  path = next((run.folder / 'JPEGImages').iterdir())
  with pytest.MonkeyPatch.context() as patch:
    arrays = iter([np.load(path)])  # it is made once
    patch.setattr(np, 'load', lambda *_, **__: next(arrays))
    found = serve.read(path.read_bytes(), 10_000, info)
  np.testing.assert_array_equal(found, np.load(path))
  tifffile = pytest.importorskip('tifffile')
  how = {'photometric': 'minisblack', 'planarconfig': 'contig'}
  tifffile.imwrite(file := io.BytesIO(), found, **how)
  np.testing.assert_array_equal(
    serve.read(file.getvalue(), 10_000, info), found
  )
  with pytest.raises(serve.HTTPException, match='40x48, 0') as error:
    serve.read(path.read_bytes(), 40 * 48 - 1, info)
  assert error.value.status_code == 413
  png = serve.images.encode_image(np.zeros((4, 4, 3), np.uint8))
  with pytest.raises(serve.HTTPException, match='must be uint16') as error:
    serve.read(png, 10_000, info)
  assert error.value.status_code == 400
  with pytest.raises(UserError, match='--examples: the page shows RGB'):
    serve.make_examples([str(run.folder)], info)


def test_weights_of_rgb_are_adapted_to_bands(run, random_variables, caplog):
  config = make_config(run.settings, model__preset='paper')
  variables = random_variables(of_channels(make(sync_bn=False), 4))
  state = steps.TrainState(0, **variables, opt_state=None)
  rgb = random_variables(make(sync_bn=False), seed=1)
  with caplog.at_level(logging.INFO):
    state = initialize(pretrained(rgb), state, config)
  assert 'adapted: the stem, from 3 to 4 channels, times 0.4525' in caplog.text
  kernel = flatten(rgb)[STEM][:, :, [0, 1, 2, 0]]
  found = flatten(state.variables)[STEM]
  expected = kernel * (3 / 4) * (57.7 / 127.5)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_network_of_bands_and_one_of_rgb_are_told_apart(run):
  info = build.open_dataset(make_config(run.settings), 'train').info
  rgb = dataclasses.replace(info, bits=8, mean=(), std=())
  model = {'preset': 'paper', **dict.fromkeys(networks.SHAPING)}
  there, here = (networks.describe(model, x.to_json()) for x in (rgb, info))
  message = r"'RGB', 8\) there, \(4, 16\) asked for"
  with pytest.raises(UserError, match=message):
    networks.check_same_architecture(there, here, run.workdir)
  del there['dataset']['mean'], there['dataset']['bits']  # of older versions
  with pytest.raises(UserError, match=message):
    networks.check_same_architecture(there, here, run.workdir)


def test_images_of_two_kinds_are_named(run, tmp_path):
  folder = write_bands(tmp_path / 'mini', {'train': 3, 'val': 1})
  path = folder / 'JPEGImages/train_1.npy'
  np.save(path, np.load(path)[..., :3])
  config = make_config(
    run.settings, data__dir=str(folder), data__prepared_dir=str(tmp_path)
  )
  message = (
    'train_1.npy has 3 channels of 16 bits, but train_0 4 channels of 16'
  )
  with pytest.raises(UserError, match=message):
    build.open_dataset(config, 'train')
  path.write_bytes((folder / 'JPEGImages/train_0.npy').read_bytes())
  label = (folder / 'SegmentationClass/train_0.png').read_bytes()
  (folder / 'SegmentationClass/train_1.png').write_bytes(label)
  path = folder / 'JPEGImages/val_0.npy'
  np.save(path, (np.load(path) // 256).astype(np.uint8))
  with pytest.raises(UserError, match='val has images of 4 channels of 8 bits'):
    build.open_dataset(config, 'train', 'val')


def test_saturation_of_other_images_is_refused(run):
  config = make_config(run.settings, data__color_jitter=(0.1, 0.1, 0.1, 0.0))
  dataset = build.open_dataset(config, 'train')
  with pytest.raises(
    UserError, match=r'config\.data: color_jitter: saturation'
  ):
    build.make_iterator(config, dataset)


def test_the_input_benchmark_measures_each_part_for_bands(run):
  config = make_config(run.settings, data__cutout=0.5)
  parts = measure._parts(config, build.open_dataset(config, 'train'))
  names = ['decode', 'RandomScaleCropFlip', 'ColorJitter', 'Cutout']
  assert list(parts) == names and min(parts.values()) > 0


def test_data_sets_that_keep_no_other_images_refuse_the_setting():
  config = make_config({}, data__as_stored=True)
  with pytest.raises(UserError, match=r'config\.data\.as_stored=True is for'):
    build.open_dataset(config, 'train')


@pytest.fixture(scope='module')
def rgb(random_variables):
  model = make(sync_bn=False)
  return model, random_variables(model)


def pretrained(variables):
  arrays = flatten(variables)
  names = NameMap({path: path for path in arrays})
  return Pretrained('source', names, arrays, ('paper',), {})


def of_channels(model, channels):
  """The same network for images of so many channels, all normalized alike."""
  return model.clone(mean=(127.5,) * channels, std=(127.5,) * channels)


def test_gray_gives_what_rgb_gives_for_gray_three_times(rgb):
  model, variables = rgb
  gray = np.random.default_rng(0).integers(0, 256, (1, 49, 33, 1), np.uint8)
  single = of_channels(model, 1)
  fresh = jax.eval_shape(
    lambda: single.init(jax.random.key(0), gray, train=False)
  )
  adapted, report = pretrained(variables).merge_into(fresh)
  assert 'adapted: the stem, from 3 to 1 channels' in str(report)
  found = jax.jit(lambda v, x: single.apply(v, x, train=False))(adapted, gray)
  expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, gray.repeat(3, -1)
  )
  np.testing.assert_allclose(
    found, expected, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.parametrize('channels', [2, 4, 6])
def test_stems_of_other_channels_answer_equal_bands_as_rgb(channels):
  kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 8)).astype('f')
  found, _ = adapt_stem(kernel, channels, 1.0)
  for index in range(channels):
    expected = kernel[:, :, index % 3] * (3 / channels)
    np.testing.assert_allclose(found[:, :, index], expected, rtol=1e-6)
  if channels % 3 == 0:  # timm's rule keeps the sum then
    np.testing.assert_allclose(found.sum(2), kernel.sum(2), atol=1e-5)


def test_measured_normalization_keeps_the_size_of_activations():
  # ImageNet's values have a deviation of about 57.7 in 0..255.
  assert input_std('keras', measured=False) == pytest.approx(57.7 / 127.5)
  assert input_std('seed', measured=False) == pytest.approx(57.7)
  assert input_std('seed', measured=True) == 1
  kernel = np.ones((7, 7, 3, 2), np.float16)
  found, done = adapt_stem(kernel, 3, 57.7 / 127.5)
  np.testing.assert_allclose(found, 57.7 / 127.5)
  assert done == 'the stem, from 3 to 3 channels, times 0.4525'
  assert adapt_stem(kernel, 3, 1.0)[0] is kernel


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
@pytest.mark.parametrize('size', [(13, 9), (30, 41)])
def test_images_of_any_channels_are_resized_band_by_band(channels, size):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 60_000, (20, 30, channels)).astype(np.uint16)
  found = windows.resized(image, size)
  assert found.shape == (*size, channels) and found.dtype == np.uint16
  for i in range(channels):
    one = windows.resized(image[..., i : i + 1], size)[..., 0]
    assert np.abs(found[..., i].astype(int) - one).max() <= 1


def test_a_predictor_of_six_bands_scales_them(random_variables):
  model = of_channels(make(sync_bn=False), 6)
  image = np.random.default_rng(0).integers(0, 256, (90, 70, 6), np.uint8)
  variables = random_variables(model)
  info = DatasetInfo(
    'six', tuple('abcd'), voc_palette(4), 255, (), -1, 8, (9,) * 6, (5,) * 6
  )
  assert Predictor(model, variables, info, max_side=40)(image).shape == (90, 70)


def test_a_network_of_one_channel_refuses_rgb():
  model = deeplab_v3('resnet18', width=0.125, mean=(5.0,), std=(2.0,))
  with pytest.raises(ValueError, match=r'must be \[B, H, W, 1\]'):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), np.zeros((1, 9, 9, 3)), train=False)
    )
