import jax
import numpy as np
import pytest

from deeplab_jax import deeplab_v3
from deeplab_jax.benchmark import flops

pytestmark = pytest.mark.compiles


def test_a_1x1_convolution_has_two_operations_a_weight_and_pixel():
  count = flops.conv_flops((2, 5, 7, 3), 11)
  assert count == (2 * 2 * 5 * 7 * 3 * 11,) * 2


def test_a_stride_leaves_pixels_out():
  count = flops.conv_flops((1, 5, 4, 1), 1, stride=2)
  assert count.on_map == 2 * 3 * 2


def test_taps_off_the_map_do_not_count():
  # along an axis of 3 pixels the three taps lie on the map 2, 3 and 2 times
  count = flops.conv_flops((1, 3, 3, 1), 1, kernel_size=3)
  assert count == (2 * 9 * 9, 2 * 7 * 7)


@pytest.mark.parametrize('size', [(1, 6), (7, 4)])
@pytest.mark.parametrize(
  ('kernel_size', 'stride', 'rate'),
  [(3, 1, 1), (3, 2, 1), (3, 1, 3), (3, 2, 4), (3, 1, 9), (7, 2, 1)],
)
def test_operations_on_the_map_are_those_a_loop_finds(
  size, kernel_size, stride, rate
):
  middle, found = kernel_size // 2, 0
  for y, x in np.ndindex(size):
    if y % stride or x % stride:
      continue
    for i, j in np.ndindex(kernel_size, kernel_size):
      row, column = y + rate * (i - middle), x + rate * (j - middle)
      found += 0 <= row < size[0] and 0 <= column < size[1]
  count = flops.conv_flops((3, *size, 5), 4, kernel_size, stride, rate)
  assert count.on_map == found * 2 * 3 * 5 * 4


def test_gradients_take_twice_as_many_but_that_of_the_images():
  counts = flops.count_flops(deeplab_v3('resnet18', width=0.125), (33, 33))
  gradients = flops.backward(counts)
  assert gradients.keys() == counts.keys()
  for name, count in counts.items():
    factor = 1 if name == 'backbone/stem' else 2
    expected = factor * count.padded, factor * count.on_map
    assert gradients[name] == expected, name


def test_resnet50_has_the_published_number_of_multiplications():
  # 4.089 G at 224 px, of which the class layer's 2048 * 1000 are not here
  # 'asymmetric', since others see 224 pixels as 225.
  model = deeplab_v3(
    'resnet50', preset='timm', output_stride=32, upsampling='asymmetric'
  )
  counts = flops.count_flops(model, (224, 224))
  backbone = [
    count.padded for name, count in counts.items() if 'backbone' in name
  ]
  assert sum(backbone) == 2 * (4_089_184_256 - 2048 * 1000)


def test_a_network_has_the_operations_that_xla_counts():
  model = deeplab_v3('resnet18', width=0.5)
  counts = flops.count_flops(model, (129, 97), batch_size=2)
  images = np.zeros((2, 129, 97, 3), np.uint8)
  variables = jax.eval_shape(
    lambda key: model.init(key, images, train=False), jax.random.key(0)
  )
  lowered = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(
    variables, images
  )
  # which leaves padding out too, and has the normalisations
  expected = lowered.cost_analysis()['flops']
  on_map = flops.total(counts.values()).on_map
  assert 0.94 * expected < on_map < expected
