"""Images in windows against the same images in one pass."""

import contextlib
import functools
import re

import cv2
import jax
import numpy as np
import pytest

from deeplab_jax import DeepLabV3, ResNetV2, deeplab_v3, ops
from deeplab_jax.evaluation import protocols, windows
from deeplab_jax.models.aspp import ASPP, Decoder
from deeplab_jax.models.resnet import PreActBasicUnit
from deeplab_jax.runtime.errors import UserError

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def margin(monkeypatch):
  """In pixels; the features of `network` reach 153."""
  monkeypatch.setattr(windows, 'MARGIN', 160)


@pytest.fixture(scope='module')
def image():
  """Noise on a slope, so that each part has another mean than the whole."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 90, (331, 470, 3))
  return (noise + np.linspace(0, 160, 470)[:, None]).astype(np.uint8)


DECODED = {
  'plus': {'decoder': Decoder(8, 4)},
  'torchvision': {'decoder': Decoder(8, 0), 'upsampling': 'half_pixel'},
  'vainf': {'decoder': Decoder(8, 4), 'upsampling': 'half_pixel'},
}


@pytest.fixture(scope='module', params=['paper', 'seed', *DECODED])
def network(request, random_variables):
  """A DeepLab of one unit a block, in the geometry of a preset."""
  seed = request.param == 'seed'
  backbone = ResNetV2(
    *((1, 1, 1, 1), PreActBasicUnit),
    multi_grid=(1,),
    width=0.125,
    conv_bias=seed,
    stem_pool='same' if seed else 'symmetric',
  )
  options = {'upsampling': 'asymmetric'} if seed else {}
  options |= DECODED.get(request.param, {})
  model = DeepLabV3(backbone, ASPP((1, 3), 8), 4, **options)
  return model, random_variables(model)


@pytest.fixture(scope='module')
def whole(network, image):
  model, variables = network
  apply = jax.jit(functools.partial(model.apply, train=False))
  return np.asarray(apply(variables, image[None]))[0]


def in_windows(network, image, side, protocol=None, **options):
  protocol = protocol or protocols.Protocol()
  options = {'softmax': False, **options}
  parts = windows.scores_in_windows(*network, protocol, image, side, **options)
  return np.concatenate(list(parts))


@pytest.mark.parametrize('side', [400, 700])
def test_windows_with_a_wide_margin_give_what_one_pass_gives(
  network, image, whole, side
):
  found = in_windows(network, image, side)
  assert found.shape == whole.shape
  assert np.abs(found - whole).max() < 2e-4 * whole.std()
  found = in_windows(network, image, side, softmax=True)
  expected = np.asarray(jax.nn.softmax(whole))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_margin_of_nothing_shows(network, image, whole, monkeypatch):
  monkeypatch.setattr(windows, 'MARGIN', 0)
  found = in_windows(network, image, 336)
  assert np.abs(found - whole).max() > 0.05 * whole.std()


@pytest.mark.parametrize('length', [1, 7, 8, 9, 20, 31])
def test_windows_cover_each_cell_once_and_keep_their_margin(length):
  count = np.zeros((length, 12), int)
  for place, kept in windows._windows((length, 12), 8, 3):
    for where, own, end in zip(place, kept, (length, 12), strict=True):
      assert where.stop - where.start == min(8, end)
      assert own.start >= where.start + 3 * (where.start > 0)
      assert own.stop <= where.stop - 3 * (where.stop < end)
    count[kept] += 1
  assert (count == 1).all()


@pytest.mark.parametrize('size', [(120, 150), (30, 150), (64, 64), (65, 40)])
def test_sliding_windows_line_by_line_are_those_of_the_protocol(network, size):
  rng = np.random.default_rng(1)
  image = rng.integers(0, 256, (*size, 3), np.uint8)
  model, variables = network
  protocol = protocols.SlidingWindow(crop_size=(64, 65), flip=True)
  scores = jax.jit(protocol.scores(model))
  expected = scores(variables, image[None], np.array([size]))[0]
  found = in_windows(network, image, 64, protocol)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_resized_scores_are_those_of_opencv():
  rng = np.random.default_rng(2)
  scores = rng.random((7, 9, 3), np.float32)
  found = np.concatenate(list(windows.resized_scores(scores, (150, 31))))
  expected = cv2.resize(scores, (31, 150), interpolation=cv2.INTER_LINEAR)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_windows_are_counted_in_the_log(
  network, image, whole, monkeypatch, caplog
):
  monkeypatch.setattr('deeplab_jax.runtime.progress._SECONDS', -1)
  with caplog.at_level('INFO', 'deeplab_jax'):
    in_windows(network, image, 400)
    in_windows(network, image, 64, protocols.SlidingWindow(crop_size=(64, 65)))
  text = '\n'.join(record.getMessage() for record in caplog.records)
  of_image = 'windows of 331x470 pixels'
  assert re.findall(rf'(\d+)/(\d+) {of_image}  [\d.]+/s  [\d:]+ left', text)
  lines = re.findall(rf'(\d+)/(\d+) lines of {of_image}', text)
  count = -(-(331 - 64) // 43) + 1
  assert lines == [(str(i), str(count)) for i in range(2, count + 1)]


def test_what_windows_cannot_do_is_refused(network, image):
  with pytest.raises(UserError, match=r'window=335, which must be from 336$'):
    in_windows(network, image, 335)
  with pytest.raises(UserError, match=r'331x470 pixels is too large.*max_side'):
    in_windows(network, image, 600, protocols.Protocol(flip=True))
  model = network[0].clone(aspp=network[0].backbone)
  with pytest.raises(UserError, match='the head ResNetV2; set'):
    in_windows((model, network[1]), image, 600)


def test_the_smallest_window_that_is_taken_moves_on():
  model = deeplab_v3('resnet18', decoder='v3plus', output_stride=8)
  stride, image = 8, (4000, 4000)
  for side in range(300, 1000, stride):
    with contextlib.suppress(UserError):
      windows.check(model, protocols.Protocol(), image, side)
      break
  assert side // stride > 2 * windows._halo(model)
  assert windows._windows((99, 99), side // stride, windows._halo(model))


def test_cached_kernels_are_used_as_they_are(network, image, whole):
  model, variables = network
  cached = ops.cache_kernels(model, variables, (385, 385))
  found = windows.map_logits(model, cached, image, 336)
  plain = windows.map_logits(model, variables, image, 400)
  np.testing.assert_allclose(found, plain, atol=2e-4 * whole.std())
