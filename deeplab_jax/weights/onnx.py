"""The network as an ONNX graph, for images of any size.

It is written from the modules and their variables, layer by layer, as `models`
reads. ONNX has the channels second, so maps are [B, C, H, W] here. Batch
normalization that follows a convolution is folded into it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.models.resnet import (
  PreActBasicUnit,
  PreActBottleneckUnit,
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
    model: a `DeepLabV3` of a `ResNetV2` and an `ASPP`.
    variables: the model's variables. Kernels may be of 16 bits, to be stored
      so; the computation is float32.
    size: (height, width) of the images; empty for any.
    probabilities: add the output `probabilities`, float32 [B, H, W, C].
    dtype: of the images.

  Raises:
    ValueError: for a network of other modules.
  """
  backbone, units = model.backbone, (PreActBasicUnit, PreActBottleneckUnit)
  known = isinstance(backbone, ResNetV2) and backbone.unit in units
  if not known or not isinstance(model.aspp, ASPP):
    raise ValueError(
      'only a ResNetV2 of this project under its ASPP can be written as ONNX;'
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
  x = _backbone(graph, x, model.backbone, model.features == 'postnorm')
  x = graph.conv(_aspp(graph, x, model.aspp), 'logits')
  leading = op('Gather', op('Shape', x), np.array([0, 1]))
  full = op('Concat', leading, shown, axis=0)
  # ONNX has the same names for the two ways.
  way = {'mode': 'linear', 'coordinate_transformation_mode': model.upsampling}
  x = op('Resize', x, '', '', full, **way)
  return op('Slice', x, np.zeros(2, int), size, np.array([2, 3]))


def _backbone(graph: '_Graph', x: str, backbone: Any, postnorm: bool) -> str:
  """The stages of `ResNetV2`."""
  graph.epsilon = backbone.norm(use_running_average=True).epsilon
  x = graph.conv(x, 'backbone/stem', 2)
  if backbone.stem_pool == 'zero':
    x = graph.op('Pad', x, np.array([0, 0, 1, 1] * 2))
  border: dict[str, Any] = {
    'same': {'auto_pad': 'SAME_UPPER'},
    'symmetric': {'pads': [1] * 4},
  }
  pads = border.get(backbone.stem_pool, {})
  x = graph.op('MaxPool', x, kernel_shape=[3] * 2, strides=[2] * 2, **pads)
  own = (backbone.output_stride, backbone.multi_grid, backbone.stride_unit)
  for i, block in enumerate(unit_geometry(backbone.units, *own), 1):
    for j, geometry in enumerate(block, 1):
      path = f'backbone/block{i}/unit{j}'
      x = _unit(graph, x, path, geometry, backbone.unit)
  return graph.norm_relu(x, 'backbone/postnorm') if postnorm else x


def _unit(
  graph: '_Graph', x: str, path: str, geometry: UnitGeometry, unit: Any
) -> str:
  """`PreActBasicUnit` or `PreActBottleneckUnit`."""
  stride, rate, rate_out = geometry
  y = graph.norm_relu(x, f'{path}/preact')
  shortcut = x
  if f'params/{path}/shortcut/kernel' in graph.variables:
    shortcut = graph.conv(y, f'{path}/shortcut', stride)
  elif stride > 1:  # every second pixel, in the layout of convolutions
    two: Any = {'kernel_shape': [1] * 2, 'strides': [stride] * 2}
    shortcut = graph.op('MaxPool', x, **two)
  norm1, norm2 = f'{path}/norm1', f'{path}/norm2'
  if unit is PreActBasicUnit:
    y = graph.conv(y, f'{path}/conv1', stride, rate, norm=norm1, relu=True)
    y = graph.conv(y, f'{path}/conv2', rate=rate_out)
  else:
    y = graph.conv(y, f'{path}/conv1', norm=norm1, relu=True)
    y = graph.conv(y, f'{path}/conv2', stride, rate, norm=norm2, relu=True)
    y = graph.conv(y, f'{path}/conv3')
  return graph.op('Add', shortcut, y)


def _aspp(graph: '_Graph', x: str, aspp: Any) -> str:
  """`ASPP` with its image pooling."""
  graph.epsilon = aspp.norm(use_running_average=True).epsilon

  def conv(x: str, path: str, rate: int = 1) -> str:
    norm, relu = f'aspp/{path}/norm', aspp.activation
    return graph.conv(x, f'aspp/{path}/conv', 1, rate, norm=norm, relu=relu)

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
    """`layers.Conv`, with the batch normalization of the path `norm`."""
    stored = self.variables[f'params/{path}/kernel']
    kernel = np.asarray(stored, np.float64)
    bias = self.variables.get(f'params/{path}/bias')
    if norm:
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
