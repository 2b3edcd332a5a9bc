"""The network as an ONNX graph, for images of any size.

It is written from the modules and their variables, layer by layer, as `models`
reads. ONNX has the channels second, so maps are [B, C, H, W] here. Batch
normalization that follows a convolution is folded into it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

from deeplab_jax.models.aspp import ASPP, Decoder
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.models.resnet import (
  BasicUnit,
  BottleneckUnit,
  PreActBasicUnit,
  PreActBottleneckUnit,
  ResNetV1,
  ResNetV2,
  UnitGeometry,
  unit_geometry,
)
from deeplab_jax.weights.mapping import flatten

_OPSET, _IR_VERSION = 17, 8  # of 2022: what reads ONNX today reads these
_UINT8, _FLOAT = TensorProto.UINT8, TensorProto.FLOAT


def onnx_model(
  model: DeepLabV3,
  variables: Mapping[str, Any],
  *,
  size: Sequence[int] = (),
  probabilities: bool = False,
  dtype: Any = np.uint8,
) -> Any:
  """Writes the network with normalization, upsampling and argmax.

  Returns an `onnx.ModelProto`. Its input `images` is uint8 RGB [B, H, W, 3], or
  as stored. Its output `segmentation_map` is uint8 [B, H, W], the class of
  every pixel.

  Args:
    model: a `DeepLabV3` of a `ResNetV1` or `V2`, an `ASPP` and a `Decoder`.
    variables: the model's variables. Kernels may be of 16 bits, to be stored
      so; the computation is float32.
    size: (height, width) of the images; empty for any.
    probabilities: add the output `probabilities`, float32 [B, H, W, C].
    dtype: of the images.

  Raises:
    ValueError: for a network of other modules.
  """
  known = _UNITS.get(type(model.backbone), {})
  head = isinstance(model.aspp, ASPP) and isinstance(
    model.decoder, Decoder | None
  )
  if getattr(model.backbone, 'unit', None) not in known or not head:
    raise ValueError(
      'only a ResNet of this project under its own head can be written as ONNX;'
      ' other networks as StableHLO'
    )
  graph = _Graph(flatten(variables))
  logits = _network(graph, model)
  classes = graph.op('ArgMax', logits, axis=1, keepdims=0)
  graph.op('Cast', classes, to=_UINT8, output='segmentation_map')
  shape = ['batch', *(size or ('height', 'width'))]
  value = helper.make_tensor_value_info
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
  inputs = [value('images', kind, [*shape, len(model.mean)])]
  outputs = [value('segmentation_map', _UINT8, shape)]
  if probabilities:
    x = graph.op('Softmax', logits, axis=1)
    graph.op('Transpose', x, perm=[0, 2, 3, 1], output='probabilities')
    outputs += [value('probabilities', _FLOAT, [*shape, model.num_classes])]
  made = helper.make_model(
    helper.make_graph(graph.nodes, 'deeplab', inputs, outputs, graph.constants),
    opset_imports=[helper.make_opsetid('', _OPSET)],
    ir_version=_IR_VERSION,
    producer_name='deeplab_jax',
  )
  checker.check_model(made, full_check=True)
  return made


def _network(graph: '_Graph', model: DeepLabV3) -> str:
  """Images to logits of the same size, see `models.deeplab`."""
  op, stride = graph.op, model.backbone.output_stride
  x = op('Cast', op('Transpose', 'images', perm=[0, 3, 1, 2]), to=_FLOAT)
  for kind, values in (('Sub', model.mean), ('Div', model.std)):
    x = op(kind, x, np.array(values, np.float32).reshape(-1, 1, 1))
  size = shown = op('Gather', op('Shape', 'images'), np.array([1, 2]))
  if model.pads_freely:  # until the pixel of the last feature is included
    up, by = np.array([stride - 2]), np.array([stride])
    shown = op('Mul', op('Div', op('Add', size, up), by), by)
    shown = op('Add', shown, np.array([1]))
    pads = op('Concat', np.zeros(6, int), op('Sub', shown, size), axis=0)
    x = op('Pad', x, pads)

  def resized(x: str, wanted: str) -> str:
    leading = op('Gather', op('Shape', x), np.array([0, 1]))
    full = op('Concat', leading, wanted, axis=0)
    # ONNX has the same names for the ways.
    way = {'mode': 'linear', 'coordinate_transformation_mode': model.upsampling}
    return op('Resize', x, '', '', full, **way)

  maps = _backbone(graph, x, model.backbone)
  x = _aspp(graph, maps[model.features], model.aspp)
  if model.decoder and model.low_level:
    fine = graph.block(maps['low_level'], 'decoder/low', relu=True)
    grid = op('Gather', op('Shape', fine), np.array([2, 3]))
    x = op('Concat', fine, resized(x, grid), axis=1)
  if model.decoder:
    x = graph.block(x, 'decoder/conv', relu=True)
  x = resized(graph.conv(x, 'logits'), shown)
  return op('Slice', x, np.zeros(2, int), size, np.array([2, 3]))


def _backbone(graph: '_Graph', x: str, backbone: Any) -> dict[str, str]:
  """The stages of `ResNetV1` or `ResNetV2`, those that a head may read."""
  graph.epsilon = backbone.norm(use_running_average=True).epsilon
  v1 = isinstance(backbone, ResNetV1)
  x = graph.conv(x, 'backbone/stem', 2, norm='backbone/stem_norm', relu=v1)
  if backbone.stem_pool == 'zero':
    x = graph.op('Pad', x, np.array([0, 0, 1, 1] * 2))
  border: dict[str, Any] = {
    'same': {'auto_pad': 'SAME_UPPER'},
    'symmetric': {'pads': [1] * 4},
  }
  pads = border.get(backbone.stem_pool, {})
  x = graph.op('MaxPool', x, kernel_shape=[3] * 2, strides=[2] * 2, **pads)
  own = (backbone.output_stride, backbone.multi_grid, backbone.stride_unit)
  unit, low_level = _UNITS[type(backbone)][backbone.unit], x
  for i, block in enumerate(unit_geometry(backbone.units, *own), 1):
    for j, geometry in enumerate(block, 1):
      before = x
      x = unit(graph, x, f'backbone/block{i}/unit{j}', geometry)
    if i == 1:
      low_level = before if geometry.stride > 1 else x
  last = x if v1 else graph.norm_relu(x, 'backbone/postnorm')
  return {'low_level': low_level, 'block4': x, 'postnorm': last}


def _shortcut(graph: '_Graph', x: str, y: str, path: str, stride: int) -> str:
  """What is added to a residual: `y` projected, or else `x` subsampled."""
  if f'params/{path}/shortcut/kernel' in graph.variables:
    norm = f'{path}/shortcut_norm'
    return graph.conv(y, f'{path}/shortcut', stride, norm=norm)
  if stride > 1:  # every second pixel, in the layout of convolutions
    two: Any = {'kernel_shape': [1] * 2, 'strides': [stride] * 2}
    return graph.op('MaxPool', x, **two)
  return x


def _preact_unit(
  graph: '_Graph', x: str, path: str, geometry: UnitGeometry, *, basic: bool
) -> str:
  """`PreActBasicUnit` or `PreActBottleneckUnit`."""
  stride, rate, rate_out = geometry
  y = graph.norm_relu(x, f'{path}/preact')
  shortcut = _shortcut(graph, x, y, path, stride)
  norm1, norm2 = f'{path}/norm1', f'{path}/norm2'
  if basic:
    y = graph.conv(y, f'{path}/conv1', stride, rate, norm=norm1, relu=True)
    y = graph.conv(y, f'{path}/conv2', rate=rate_out)
  else:
    y = graph.conv(y, f'{path}/conv1', norm=norm1, relu=True)
    y = graph.conv(y, f'{path}/conv2', stride, rate, norm=norm2, relu=True)
    y = graph.conv(y, f'{path}/conv3')
  return graph.op('Add', shortcut, y)


def _unit(
  graph: '_Graph', x: str, path: str, geometry: UnitGeometry, *, basic: bool
) -> str:
  """`BasicUnit` or `BottleneckUnit`."""
  stride, rate, rate_out = geometry

  def conv(x: str, i: int, stride: int, rate: int, relu: bool = True) -> str:
    kernel, norm = f'{path}/conv{i}', f'{path}/norm{i}'
    return graph.conv(x, kernel, stride, rate, norm=norm, relu=relu)

  if basic:
    y = conv(conv(x, 1, stride, rate), 2, 1, rate_out, relu=False)
  else:
    y = conv(conv(x, 1, 1, 1), 2, stride, rate)
    y = conv(y, 3, 1, 1, relu=False)
  y = graph.op('Add', _shortcut(graph, x, x, path, stride), y)
  return graph.op('Relu', y)


# How to write each kind of unit, by the backbones that may have it.
_UNITS: dict[Any, dict[Any, Any]] = {
  ResNetV1: {
    BasicUnit: functools.partial(_unit, basic=True),
    BottleneckUnit: functools.partial(_unit, basic=False),
  },
  ResNetV2: {
    PreActBasicUnit: functools.partial(_preact_unit, basic=True),
    PreActBottleneckUnit: functools.partial(_preact_unit, basic=False),
  },
}


def _aspp(graph: '_Graph', x: str, aspp: Any) -> str:
  """`ASPP` with its image pooling."""
  graph.epsilon = aspp.norm(use_running_average=True).epsilon

  def conv(x: str, path: str, rate: int = 1) -> str:
    return graph.block(x, f'aspp/{path}', rate, relu=aspp.activation)

  pooled = conv(graph.op('GlobalAveragePool', x), 'pooling/project')
  size = graph.op('Gather', graph.op('Shape', x), np.array([2, 3]))
  spread = graph.op('Concat', np.array([1, 1]), size, axis=0)
  branches = [graph.op('Expand', pooled, spread), conv(x, 'conv')]
  for i, rate in enumerate(aspp.rates, 1):
    branches.append(conv(x, f'atrous{i}', rate))
  return conv(graph.op('Concat', *branches, axis=1), 'project')


class _Graph:
  """Nodes and constants of a graph, and the variables of a network by path."""

  def __init__(self, variables: Mapping[str, Any]) -> None:
    self.variables = variables
    self.nodes: list[Any] = []
    self.constants: list[Any] = []
    self.epsilon = 0.0  # of the batch normalizations that follow

  def op(
    self, kind: str, *inputs: Any, output: str = '', **attributes: Any
  ) -> str:
    """Adds a node and returns the name of its output.

    An input is a name, '' for one left out, or an array, which is stored.
    """
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    output = output or f'{kind}_{len(self.nodes)}'
    self.nodes.append(helper.make_node(kind, names, [output], **attributes))
    return output

  def conv(
    self,
    x: str,
    path: str,
    stride: int = 1,
    rate: int = 1,
    *,
    norm: str = '',
    relu: bool = False,
  ) -> str:
    """`layers.Conv`, with batch normalization if there is one at `norm`."""
    stored = self.variables[f'params/{path}/kernel']
    kernel = np.asarray(stored, np.float64)
    bias = self.variables.get(f'params/{path}/bias')
    if f'params/{norm}/scale' in self.variables:
      scale, shift, mean, var = map(np.float64, self._norm(norm))
      factor = scale / np.sqrt(var + self.epsilon)
      kernel = kernel * factor
      bias = shift + ((0 if bias is None else bias) - mean) * factor
    kernel = kernel.transpose(3, 2, 0, 1).astype(stored.dtype)
    weights: list[Any] = (
      [kernel] if bias is None else [kernel, np.float32(bias)]
    )
    if kernel.dtype != np.float32:
      weights[0] = self.op('Cast', kernel, to=_FLOAT)
    pad = rate * (kernel.shape[-1] // 2)
    two: dict[str, Any] = {'strides': [stride] * 2, 'dilations': [rate] * 2}
    x = self.op('Conv', x, *weights, pads=[pad] * 4, **two)
    return self.op('Relu', x) if relu else x

  def block(self, x: str, path: str, rate: int = 1, *, relu: bool) -> str:
    """`layers.ConvNormRelu`."""
    norm = f'{path}/norm'
    return self.conv(x, f'{path}/conv', 1, rate, norm=norm, relu=relu)

  def norm_relu(self, x: str, path: str) -> str:
    """Batch normalization and ReLU."""
    x = self.op(
      'BatchNormalization', x, *self._norm(path), epsilon=self.epsilon
    )
    return self.op('Relu', x)

  def _norm(self, path: str) -> list[np.ndarray]:
    names = [f'params/{path}/{leaf}' for leaf in ('scale', 'bias')]
    names += [f'batch_stats/{path}/{leaf}' for leaf in ('mean', 'var')]
    return [np.asarray(self.variables[name]) for name in names]

  def _constant(self, values: np.ndarray) -> str:
    name = f'constant_{len(self.constants)}'
    self.constants.append(numpy_helper.from_array(values, name))
    return name
