"""The reference networks: names and shapes of their variables, and files.

They are written down as the references have them, independently of the
project's own mappings. `base` is the number of channels of the stem.
"""

import zlib

import h5py
import numpy as np
from safetensors.numpy import save_file

UNITS = (3, 4, 6, 3)


def weight(name, shape, kind):
  """The formula of the reference outputs, see `golden/README.md`.

  Args:
    name: of the variable in the reference network.
    shape: of the variable there.
    kind: 'slim' for TensorFlow's names and layout, 'torch' for PyTorch's.
  """
  r = np.random.default_rng(zlib.crc32(name.encode()))
  if kind == 'slim':
    scale = name.endswith(('gamma', 'moving_variance'))
    shift = name.endswith(('beta', 'moving_mean', 'biases'))
    fan_in = np.prod(shape[:-1])  # HWIO
  else:
    norm = len(shape) == 1
    scale = name.endswith('running_var') or (norm and name.endswith('weight'))
    shift = name.endswith(('bias', 'running_mean'))
    fan_in = np.prod(shape[1:])  # OIHW
  if scale:
    a = r.uniform(0.5, 1.5, shape)
  elif shift:
    a = r.normal(0, 0.1, shape)
  else:
    a = r.normal(0, 1, shape) * np.sqrt(1.0 / fan_in)
  return a.astype(np.float32)


def slim_shapes(base=64, head=True, units=UNITS, classes=21):
  """Names and shapes of the seed's variables, as in its checkpoints."""

  def conv(name, *shape, biases=False, norm=False):
    yield f'{name}/weights', shape
    if biases:
      yield f'{name}/biases', shape[-1:]
    if norm:
      yield from bn(f'{name}/BatchNorm', shape[-1])

  def bn(name, width):
    for leaf in ('beta', 'gamma', 'moving_mean', 'moving_variance'):
      yield f'{name}/{leaf}', (width,)

  root = 'resnet_v2_50'
  yield from conv(f'{root}/conv1', 7, 7, 3, base, biases=True)
  last = base
  for b, count in enumerate(units, 1):
    width = base * 2 ** (b - 1)
    for u in range(1, count + 1):
      unit = f'{root}/block{b}/unit_{u}/bottleneck_v2'
      yield from bn(f'{unit}/preact', last)
      if u == 1:
        yield from conv(f'{unit}/shortcut', 1, 1, last, 4 * width, biases=True)
      yield from conv(f'{unit}/conv1', 1, 1, last, width, norm=True)
      yield from conv(f'{unit}/conv2', 3, 3, width, width, norm=True)
      yield from conv(f'{unit}/conv3', 1, 1, width, 4 * width, biases=True)
      last = 4 * width
  yield from bn(f'{root}/postnorm', last)
  yield from conv(f'{root}/logits', 1, 1, last, 1000, biases=True)
  if not head:
    return
  aspp = 'DeepLab_v3/ASPP_layer'
  for name in ('image_level_conv_1x1', 'conv_1x1_0'):
    yield from conv(f'{aspp}/{name}', 1, 1, last, 256, norm=True)
  for i in (1, 2, 3):
    yield from conv(f'{aspp}/conv_3x3_{i}', 3, 3, last, 256, norm=True)
  yield from conv(f'{aspp}/conv_1x1_output', 1, 1, 5 * 256, 256, norm=True)
  yield from conv('DeepLab_v3/logits', 1, 1, 256, classes, biases=True)


def timm_shapes(base=64, units=UNITS):
  """Names and shapes of timm's variables, as in its safetensors files."""

  def bn(name, width):
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      yield f'{name}.{leaf}', (width,)

  yield 'stem.conv.weight', (base, 3, 7, 7)
  last = base
  for s, count in enumerate(units):
    width = base * 2**s
    for b in range(count):
      block = f'stages.{s}.blocks.{b}'
      for i, channels in enumerate((last, width, width), 1):
        yield from bn(f'{block}.norm{i}', channels)
      yield f'{block}.conv1.weight', (width, last, 1, 1)
      yield f'{block}.conv2.weight', (width, width, 3, 3)
      yield f'{block}.conv3.weight', (4 * width, width, 1, 1)
      if b == 0:
        yield f'{block}.downsample.conv.weight', (4 * width, last, 1, 1)
      last = 4 * width
  yield from bn('norm', last)
  yield 'head.fc.weight', (1000, last, 1, 1)
  yield 'head.fc.bias', (1000,)


def torchvision_shapes(head='torchvision', base=64, units=UNITS, classes=21):
  """Names and shapes of torchvision's and VainF's variables.

  `head` is 'torchvision' (with the auxiliary head), 'vainf', 'v3plus', or ''
  for a ResNet of torchvision with its classifier.
  """

  def conv(name, out, into, size=1):
    yield f'{name}.weight', (out, into, size, size)

  def bn(name, width):
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      yield f'{name}.{leaf}', (width,)

  def both(name, first, out, into, size=1):
    yield from conv(f'{name}{first}', out, into, size)
    yield from bn(f'{name}{first + 1}', out)

  root, last = 'backbone.' if head else '', base
  yield from conv(f'{root}conv1', base, 3, 7)
  yield from bn(f'{root}bn1', base)
  for s, count in enumerate(units):
    width = base * 2**s
    for b in range(count):
      unit = f'{root}layer{s + 1}.{b}'
      for i, (out, into, size) in enumerate(
        ((width, last, 1), (width, width, 3), (4 * width, width, 1)), 1
      ):
        yield from conv(f'{unit}.conv{i}', out, into, size)
        yield from bn(f'{unit}.bn{i}', out)
      if b == 0:
        yield from both(f'{unit}.downsample.', 0, 4 * width, last)
      last = 4 * width
  if not head:
    yield from (('fc.weight', (1000, last)), ('fc.bias', (1000,)))
    return
  start, aspp = {
    'torchvision': ('classifier.', 'classifier.0.'),
    'vainf': ('classifier.classifier.', 'classifier.classifier.0.'),
    'v3plus': ('classifier.classifier.', 'classifier.aspp.'),
  }[head]
  plus = head == 'v3plus'
  if plus:
    yield from both('classifier.project.', 0, 48, 4 * base)
  for i in range(4):
    yield from both(f'{aspp}convs.{i}.', 0, 256, last, 3 if i else 1)
  yield from both(f'{aspp}convs.4.', 1, 256, last)
  yield from both(f'{aspp}project.', 0, 256, 5 * 256)
  yield from both(start, 1 - plus, 256, 256 + 48 * plus, 3)
  yield f'{start}{4 - plus}.weight', (classes, 256, 1, 1)
  yield f'{start}{4 - plus}.bias', (classes,)
  if head == 'torchvision':
    yield from both('aux_classifier.', 0, last // 8, last // 2, 3)
    yield 'aux_classifier.4.weight', (classes, last // 8, 1, 1)
    yield 'aux_classifier.4.bias', (classes,)


def keras_shapes(base=64, top=False, units=UNITS):
  """Names and shapes of `ResNet50V2`, as Keras 3.15 prints them."""

  def conv(name, *shape, bias=True):
    yield f'{name}/kernel', shape
    if bias:
      yield f'{name}/bias', shape[-1:]

  def bn(name, width):
    for leaf in ('gamma', 'beta', 'moving_mean', 'moving_variance'):
      yield f'{name}/{leaf}', (width,)

  yield from conv('conv1_conv', 7, 7, 3, base)
  last = base
  for s, count in enumerate(units, 2):
    width = base * 2 ** (s - 2)
    for b in range(1, count + 1):
      block = f'conv{s}_block{b}'
      yield from bn(f'{block}_preact_bn', last)
      if b == 1:
        yield from conv(f'{block}_0_conv', 1, 1, last, 4 * width)
      yield from conv(f'{block}_1_conv', 1, 1, last, width, bias=False)
      yield from bn(f'{block}_1_bn', width)
      yield from conv(f'{block}_2_conv', 3, 3, width, width, bias=False)
      yield from bn(f'{block}_2_bn', width)
      yield from conv(f'{block}_3_conv', 1, 1, width, 4 * width)
      last = 4 * width
  yield from bn('post_bn', last)
  if top:
    yield 'predictions/kernel', (last, 1000)
    yield 'predictions/bias', (1000,)


def fill(shapes, seed=0):
  """Arrays near 1, by name."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
    for name, shape in shapes
  }


def write_keras(path, arrays):
  """Writes an `.h5` in the layout of Keras 2 and 3 and its published files."""
  layers = {}
  for name in arrays:
    layers.setdefault(name.rpartition('/')[0], []).append(name)
  with h5py.File(path, 'w') as file:
    file.attrs['layer_names'] = [b'input_1', *(n.encode() for n in layers)]
    file.create_group('input_1').attrs['weight_names'] = []
    for layer, names in layers.items():
      group = file.create_group(layer)
      group.attrs['weight_names'] = [f'{name}:0'.encode() for name in names]
      for name in names:
        group[f'{name}:0'] = arrays[name]
  return path


def write_timm(path, arrays):
  save_file(arrays, path)
  return path
