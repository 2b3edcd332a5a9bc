"""Averages over scales, mirrored images and windows against slow loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from miniature import needs_cpu

from deeplab_jax import DeepLabV3, ResNetV2, deeplab_v3, ops
from deeplab_jax.evaluation import protocols
from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.resnet import PreActBasicUnit

pytestmark = pytest.mark.compiles

CLASSES = 4


@pytest.fixture(scope='module')
def images():
  """Two images of differing sizes, padded to one, and the sizes."""
  rng = np.random.default_rng(0)
  images = np.full((2, 49, 65, 3), (124, 117, 104), np.uint8)
  sizes = np.array([[49, 65], [40, 51]], np.int32)
  for image, (height, width) in zip(images, sizes, strict=True):
    image[:height, :width] = rng.integers(0, 256, (height, width, 3))
  return images, sizes


@pytest.fixture(scope='module')
def network(random_variables):
  """A DeepLab of one unit a block, its variables and logits by numpy."""
  norm = functools.partial(nn.BatchNorm, momentum=0.9)
  backbone = ResNetV2(
    (1, 1, 1, 1), PreActBasicUnit, multi_grid=(2,), width=0.125, norm=norm
  )
  model = DeepLabV3(backbone, ASPP((6,), 8, norm=norm), CLASSES)
  variables = random_variables(model)
  apply = jax.jit(functools.partial(model.apply, train=False))

  def logits(images, sizes=None):
    return np.asarray(apply(variables, images, sizes=sizes))

  return model, variables, logits


class Patterned:
  """Not a network, but as blind to nothing: cheap, and unlike its mirror."""

  num_classes = CLASSES

  def apply(self, variables, images, *, train, sizes=None):
    del sizes
    assert not train
    x = images.astype(jnp.float32) / 64
    row, column = jnp.indices(x.shape[1:3])
    waves = jnp.stack([jnp.sin(row + k * column) for k in range(CLASSES)], -1)
    left = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    return waves + (x + 2 * left) @ variables


PROJECTION = np.random.default_rng(1).normal(size=(3, CLASSES))


def softmax(x):
  powers = np.exp(x - x.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def resample(x, size, step):
  """Linear interpolation at multiples of `step`, an axis after the other."""
  x = np.asarray(x, np.float64)
  for axis, out in enumerate(size):
    places = np.arange(out) * step
    old = np.arange(x.shape[axis])
    x = np.apply_along_axis(
      lambda line, places=places, old=old: np.interp(places, old, line), axis, x
    )
  return x


def scaled_size(size, scale):
  """The pixels of the scaled image that lie within the image."""
  return tuple(sum(i <= (n - 1) * scale for i in range(2 * n)) for n in size)


def mirrored(image, width):
  image = image.copy()
  image[:, :width] = image[:, :width][:, ::-1]
  return image


def test_scales_and_mirror_images_equal_a_loop_of_one_at_a_time(
  network, images
):
  model, variables, logits = network
  images, sizes = images
  scales = (0.5, 0.75, 1.0, 1.75)
  ours = jax.jit(
    functools.partial(protocols.probabilities, model, scales=scales, flip=True)
  )(variables, images, sizes)
  for image, size, found in zip(images, sizes, ours, strict=True):
    # The image alone: its padding has no part in anything.
    image = image[: size[0], : size[1]]
    views = []
    for scale, flip in itertools.product(scales, (False, True)):
      view = image[:, ::-1] if flip else image
      view = resample(view, scaled_size(size, scale), 1 / scale)
      seen = logits(view[None].astype(np.float32))[0]
      seen = softmax(resample(seen, size, scale))
      views.append(seen[:, ::-1] if flip else seen)
    found = found[: size[0], : size[1]]
    np.testing.assert_allclose(found, np.mean(views, 0), atol=1e-5)


def test_scales_of_513_are_those_of_the_deeplab_code():
  scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
  expected = [257, 385, 513, 641, 769, 897]
  assert [protocols._scaled(513, scale) for scale in scales] == expected
  assert protocols._scaled(9, 0.01) == 1  # no scale leaves nothing


@pytest.mark.parametrize('scales', [(1.0,), (0.5, 1.0, 1.5)])
def test_mirrored_image_gives_the_mirrored_result(network, images, scales):
  model, variables, _ = network
  images, sizes = images
  mirror = np.stack(
    [mirrored(image, w) for image, (_, w) in zip(images, sizes, strict=True)]
  )
  look = jax.jit(
    functools.partial(protocols.probabilities, model, scales=scales, flip=True)
  )
  ours, theirs = (
    np.asarray(look(variables, x, sizes)) for x in (images, mirror)
  )
  for one, other, (_, width) in zip(ours, theirs, sizes, strict=True):
    np.testing.assert_allclose(mirrored(one, width), other, atol=1e-6)
  assert np.abs(ours - theirs).max() > 0.001


def loop_of_windows(image, size, window, overlap):
  """Every window cut from the image itself, in plain numpy."""
  total = np.zeros((*image.shape[:2], CLASSES))
  count = np.zeros((*image.shape[:2], 1))
  places = []
  for length, side in zip(size, window, strict=True):
    step = max(1, round(side * (1 - overlap)))
    starts = [0]
    while starts[-1] + side < length:
      starts.append(min(starts[-1] + step, length - side))
    places.append(starts)
  for top, left in itertools.product(*places):
    part = np.s_[top : top + window[0], left : left + window[1]]
    cut = image[part]
    missing = [(0, w - n) for w, n in zip(window, cut.shape[:2], strict=True)]
    cut = np.pad(cut, (*missing, (0, 0)))
    seen = Patterned().apply(PROJECTION, cut[None], train=False)
    seen = seen[:, : image[part].shape[0], : image[part].shape[1]]
    total[part] += softmax(np.asarray(seen[0], np.float64))
    count[part] += 1
  return total / np.maximum(count, 1)


@pytest.mark.parametrize(
  'window, overlap',
  [
    ((33, 33), 1 / 3),
    ((33, 17), 0.0),
    ((20, 31), 0.75),
    ((49, 65), 0.5),
    ((49, 1), 0.0),
    ((60, 33), 0.5),  # higher than the images
  ],
)
def test_windows_equal_a_loop_over_each_image(images, window, overlap):
  images, sizes = images
  protocol = protocols.SlidingWindow(window, overlap)
  ours = jax.jit(protocol.scores(Patterned()))(PROJECTION, images, sizes)
  for image, size, found in zip(images, sizes, ours, strict=True):
    expected = loop_of_windows(image, size, window, overlap)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    own = np.asarray(found)[: size[0], : size[1]]
    np.testing.assert_allclose(own.sum(-1), 1, atol=1e-5)


def test_windows_of_a_mirrored_image_give_the_mirrored_result(images):
  # Windows that lie symmetrically: 65 = 33 + 32 and 51 = 33 + 18.
  images, sizes = images
  protocol = protocols.SlidingWindow((33, 33), 1 / 33, flip=True)
  scores = jax.jit(protocol.scores(Patterned()))
  for image, size in zip(images, sizes, strict=True):
    one, other = (
      np.asarray(scores(PROJECTION, x[None], size[None]))[0]
      for x in (image, mirrored(image, size[1]))
    )
    height = size[0]
    np.testing.assert_allclose(
      mirrored(one, size[1])[:height], other[:height], atol=1e-6
    )


@needs_cpu
def test_windows_by_cached_kernels_give_the_same_scores(random_variables):
  model = deeplab_v3('resnet18', width=0.5, aspp_features=64)
  variables = random_variables(model)
  size = (273, 321)
  protocol = protocols.SlidingWindow((257, 257), flip=True)
  cached = ops.cache_kernels(model, variables, protocol.crop_size)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (1, *size, 3), np.uint8)
  scores = jax.jit(protocol.scores(model))
  expected, ours = (
    np.asarray(scores(v, images, np.array([size]))) for v in (variables, cached)
  )
  assert not np.array_equal(ours, expected)  # they were used
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_one_look_gives_the_logits(network, images):
  model, variables, logits = network
  images, sizes = images
  ours = jax.jit(protocols.Protocol().scores(model))(variables, images, sizes)
  np.testing.assert_allclose(ours, logits(images, sizes), atol=1e-5)
  assert np.abs(logits(images) - logits(images, sizes)).max() > 1e-3
