"""`Predictor`: any image in, its classes out."""

import functools
import io
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from miniature import make, make_config, share_programs
from PIL import Image

import deeplab_jax
from deeplab_jax import Predictor, build
from deeplab_jax.benchmark.timing import compilations
from deeplab_jax.data.datasets import DatasetInfo, voc_palette
from deeplab_jax.evaluate import evaluate
from deeplab_jax.evaluation import protocols
from deeplab_jax.evaluation.metrics import compute_metrics
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.compiles

INFO = DatasetInfo('four', tuple('abcd'), voc_palette(4))


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Each program of these predictions is traced once."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    yield


@pytest.fixture(scope='module')
def network(random_variables):
  model = make(sync_bn=False)
  return model, random_variables(model)


@pytest.fixture(scope='module')
def predictor(network):
  return Predictor(*network, INFO)


@pytest.fixture(scope='module')
def logits(network):
  """Function of one image [H, W, 3], by the network alone."""
  model, variables = network
  apply = jax.jit(functools.partial(model.apply, train=False))
  return lambda image: np.asarray(apply(variables, image[None]))[0]


def draw(height=40, width=60, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def agree(found, expected):
  """Classes are equal, but for ties that are rounded otherwise."""
  assert found.shape == expected.shape and found.dtype == np.uint8
  return (found != expected).mean() < 2e-3


def test_classes_and_probabilities_are_those_of_the_network(predictor, logits):
  image = draw()
  classes, probabilities = predictor(image, probabilities=True)
  expected = logits(image)
  softmax = np.exp(expected - expected.max(-1, keepdims=True))
  softmax /= softmax.sum(-1, keepdims=True)
  np.testing.assert_allclose(probabilities, softmax, atol=1e-5)
  assert agree(classes, expected.argmax(-1))
  np.testing.assert_array_equal(predictor(image), classes)


def test_every_kind_of_image_is_taken(predictor, tmp_path):
  image, path = draw(), tmp_path / 'a.png'
  Image.fromarray(image).save(path)
  expected = predictor(image)
  kinds = path, str(path), path.read_bytes(), Image.fromarray(image)
  for found in predictor.map(kinds):
    np.testing.assert_array_equal(found, expected)
  batch = np.stack([image, draw(seed=1)])
  found, shares = predictor(batch, probabilities=True)
  assert found.shape == (2, 40, 60) and shares.shape == (2, 40, 60, 4)
  np.testing.assert_array_equal(found[0], expected)
  assert predictor(batch).shape == (2, 40, 60)


def test_a_rotated_photo_is_segmented_as_a_viewer_shows_it(predictor):
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = 6  # a quarter turn
  Image.fromarray(draw()).save(file, 'png', exif=exif)
  assert predictor(file.getvalue()).shape == (60, 40)


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (
      np.zeros((4, 5, 3)),
      r'be uint8 \[H, W, 3\] for .* got float64 \[4, 5, 3\]',
    ),
    (np.zeros((4, 5), np.uint8), r'got uint8 \[4, 5\]'),
    (np.zeros((0, 5, 3), np.uint8), r'got uint8 \[0, 5, 3\]'),
    (b'no picture', '^image: '),
    ('nowhere.png', r'^nowhere\.png: '),
  ],
)
def test_what_is_no_image_is_named(predictor, image, message):
  with pytest.raises(UserError, match=message):
    predictor(image)


def test_a_stream_of_many_sizes_keeps_its_order_and_compiles_little(
  network, logits
):
  sizes = [(40 + 7 * (i % 5), 40 + 9 * (i % 7)) for i in range(16)]
  pictures = [draw(*size, seed=i) for i, size in enumerate(sizes)]
  predictor = Predictor(*network, INFO, sizes=2, batch_size=4)
  with compilations() as compiled:
    found = list(predictor.map(iter(pictures)))
  assert [x.shape for x in found] == sizes
  # Two to begin with, and those that they grow into.
  assert len([c for c in compiled if 'step' in str(c)]) <= 5
  for image, classes in zip(pictures[:3], found, strict=False):
    assert agree(classes, logits(image).argmax(-1))


def test_several_threads_get_what_one_gets(predictor):
  pictures = [draw(40, 50 + i % 3, seed=i) for i in range(12)]
  expected = [predictor(image) for image in pictures]
  found = {}

  def work(start):
    for i in range(start, len(pictures), 4):
      found[i] = predictor(pictures[i])

  threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for i, classes in enumerate(expected):
    np.testing.assert_array_equal(found[i], classes)


def test_large_images_are_segmented_in_windows(network, logits):
  image = draw(600, 700)
  predictor = Predictor(*network, INFO, window=560)
  predictor.plan([(20, 30), (600, 700)])
  assert agree(predictor(image), logits(image).argmax(-1))


def test_images_that_are_too_large_for_the_windows_are_refused(network):
  predictor = Predictor(*network, INFO, window=320)
  with pytest.raises(UserError, match=r'config\.predict\.window=320'):
    predictor(draw(600, 700))
  with pytest.raises(UserError, match=r'600x700 pixels is too large'):
    predictor.plan([(20, 30), (600, 700)])


def test_max_side_and_scale_bring_results_back_to_the_size(network, predictor):
  smooth = np.asarray(
    Image.fromarray(draw(6, 8)).resize((160, 120), Image.Resampling.BICUBIC)
  )
  half = np.asarray(
    Image.fromarray(smooth).resize((80, 60), Image.Resampling.BOX)
  )
  for options in ({'max_side': 80}, {'scale': 0.5}):
    shrinks = Predictor(*network, INFO, **options)
    classes, shares = shrinks(smooth, probabilities=True)
    assert classes.shape == (120, 160) and shares.shape == (120, 160, 4)
    np.testing.assert_array_equal(classes, shares.argmax(-1))
    _, small = predictor(half, probabilities=True)
    # The mean of 2 x 2 pixels that are interpolated from the small ones.
    mean = shares.reshape(60, 2, 80, 2, 4).mean((1, 3))
    assert np.abs(mean - small)[2:-2, 2:-2].mean() < 0.02
  np.testing.assert_array_equal(shrinks(half).shape, (60, 80))


def test_images_far_from_the_training_scale_are_warned_of_once(network, caplog):
  predictor = Predictor(*network, INFO, trained_size=(40, 60))
  with caplog.at_level(logging.WARNING, 'deeplab_jax'):
    predictor(draw(100, 150))
    assert not caplog.messages
    list(predictor.map([draw(130, 190), draw(131, 190), draw(12, 12)]))
  assert len(caplog.messages) == 2
  assert caplog.messages[0].startswith('an image is 130x190, and the network')
  assert 'config.predict.max_side' in caplog.messages[0]
  assert 'config.predict.scale' in caplog.messages[1]


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'protocol': 'sliding_window', 'crop_size': (33, 41)},
    {'scales': (0.75, 1.25), 'flip': True},
    {'output_stride': 8},
  ],
  ids=str,
)
def test_confusion_is_that_of_eval_pixel_for_pixel(trained, settings):
  own = dict(settings)
  stride = own.pop('output_stride', None)
  changes = {f'eval__{key}': value for key, value in own.items()}
  if stride:
    changes['model__output_stride'] = stride
  config = make_config(trained.settings, **changes)
  expected = evaluate(config, trained.workdir)
  predictor = Predictor.from_workdir(trained.workdir, **settings)
  source = build.open_dataset(config, 'val').source('val')
  confusion = np.zeros((4, 4), np.int64)
  for record in source:
    truth = np.asarray(Image.open(io.BytesIO(record['label'])))
    found = predictor(record['image'])
    valid = truth < 4
    np.add.at(confusion, (truth[valid], found[valid]), 1)
  metrics = compute_metrics(confusion, predictor.info.classes)
  for key in ('miou', 'pixel_accuracy', 'per_class_iou'):
    assert metrics[key] == expected[key]


def test_a_workdir_gives_its_checkpoint_and_what_it_means(trained):
  predictor = Predictor.from_workdir(str(trained.workdir), 'latest')
  assert predictor.info.classes == ('ground', 'left', 'right', 'absent')
  assert predictor.step == 6 and predictor.metrics['miou'] >= 0
  assert predictor.trained_size == tuple(trained.config.data.crop_size)
  assert predictor.settings['backbone'] == trained.config.model.backbone
  same = Predictor.from_pretrained(trained.workdir, flip=True)
  assert same.protocol.flip


def test_center_crops_are_seen_whole(trained):
  predictor = Predictor.from_workdir(trained.workdir, protocol='center_crop')
  assert type(predictor.protocol) is protocols.Protocol


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'protocl': 'whole'}, 'a setting must be one of .*protocol'),
    ({'protocol': 'half'}, 'config.eval: protocol must be whole or'),
    ({'scales': (9.0,)}, 'config.eval: scales must be'),
    ({'scale': 0.0}, 'config.predict: scale must be above 0'),
    ({'max_side': -1}, 'config.predict: max_side must be at least 1'),
    ({'window': 0}, 'config.predict: window must be at least 1'),
    ({'step': 77}, '77 is not in'),
  ],
  ids=str,
)
def test_wrong_settings_are_named(trained, settings, message):
  with pytest.raises(ValueError, match=message):
    Predictor.from_workdir(trained.workdir, **settings)


def test_wrong_numbers_and_classes_are_refused(network):
  for name in ('batch_size', 'sizes', 'window', 'max_side'):
    with pytest.raises(ValueError, match=f'{name} must be at least 1, got 0'):
      Predictor(*network, INFO, **{name: 0})
  three = DatasetInfo('three', tuple('abc'), voc_palette(3))
  with pytest.raises(ValueError, match='info must have 4 classes'):
    Predictor(*network, three)


def test_a_protocol_of_ones_own_is_used_as_it_is(network):
  class Fixed(protocols.Protocol):
    """Gives class 2 the probability 1."""

    def scores(self, model):
      def scores(variables, images, sizes):
        assert sizes.shape == (len(images), 2)
        return jnp.zeros((*images.shape[:3], 4)).at[..., 2].set(1)

      return scores

  predictor = Predictor(*network, INFO, protocol=Fixed(), window=50)
  classes, shares = predictor(draw(), probabilities=True)
  assert (classes == 2).all() and (shares[..., 2] == 1).all()
  with pytest.raises(UserError, match='too large for the protocol whole with'):
    predictor(draw(80, 80))


def test_an_image_of_a_shape_of_its_own_swells_no_other(network):
  predictor = Predictor(*network, INFO, sizes=1, window=300)
  assert predictor.bucket((40, 60)) == (40, 60)
  assert predictor.bucket((50, 90)) == (64, 128)
  assert predictor.bucket((3, 20000)) == (3, 20000)
  assert predictor.bucket((40, 60)) == (64, 128)


def test_max_side_comes_before_scale(network):
  predictor = Predictor(*network, INFO, max_side=100, scale=0.5)
  assert predictor._size_seen((50, 400)) == (6, 50)
  assert predictor._size_seen((50, 80)) == (25, 40)


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
  with pytest.raises(UserError, match=f'no checkpoint in {tmp_path}'):
    Predictor.from_workdir(tmp_path)
  with pytest.raises(UserError, match='nowhere'):
    Predictor.from_pretrained(tmp_path / 'nowhere.h5')


def test_the_package_names_it_but_does_not_load_it():
  assert 'Predictor' in deeplab_jax.__all__
  with pytest.raises(AttributeError, match="no attribute 'Predictr'"):
    _ = deeplab_jax.Predictr
