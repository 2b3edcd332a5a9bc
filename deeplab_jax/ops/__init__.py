"""The network's operations, with one switch for how convolutions run.

`conv2d` has two forms that agree up to rounding: XLA's own convolution, and a
faster one for CPUs. A program uses the form that suits the platform it is
compiled for, not the machine that traces it. `use` forces one form everywhere:

```
with ops.use('xla'):  # on CPUs too, as in exported programs
  logits = model.apply(variables, images, train=False)
```
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deeplab_jax.ops import convolutions
from deeplab_jax.ops.linear import linear_call
from deeplab_jax.ops.padding import blank, padded, within
from deeplab_jax.runtime.errors import check_choice, require

__all__ = [
  'CachedKernel',
  'cache_kernels',
  'conv2d',
  'max_pool',
  'padded',
  'remat',
  'subsample',
  'use',
  'within',
]

FORMS = ('xla', 'cpu')
_form = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use(form: str) -> Iterator[None]:
  """Forces one form inside the block, on every platform: 'xla' or 'cpu'.

  Raises:
    ValueError: for any other form.
  """
  check_choice('form', form, FORMS)
  with _form(form):
    yield


def _by_platform(
  cpu: Callable[..., Any], xla: Callable[..., Any], **settings: Any
) -> Callable[..., Any]:
  cpu, xla = (functools.partial(form, **settings) for form in (cpu, xla))
  if _form.value is not None:
    return cpu if _form.value == 'cpu' else xla
  return functools.partial(lax.platform_dependent, cpu=cpu, default=xla)


def conv2d(
  x: jax.Array, kernel: Any, stride: int = 1, rate: int = 1
) -> jax.Array:
  """Convolves with symmetric zero padding of `rate * (k - 1) / 2` pixels.

  Args:
    x: [B, H, W, Cin].
    kernel: [k, k, Cin, Cout], k odd; or a `CachedKernel` from `cache_kernels`,
      for inference only.
    stride: spacing of the output pixels, in input pixels.
    rate: spacing of the kernel's taps, in input pixels (atrous convolution).

  Returns:
    [B, ceil(H / stride), ceil(W / stride), Cout], in the dtype of x. It can be
    differentiated any number of times, in forward and reverse mode.

  Raises:
    ValueError: if the kernel is not odd and square, or if a gradient reaches a
      `CachedKernel`.
  """
  cached: tuple[jax.Array, ...] = ()
  if isinstance(kernel, CachedKernel):
    if kernel.note is not None:
      kernel.note((jax.ShapeDtypeStruct(x.shape, x.dtype), stride, rate))
    kernel, cached = kernel.kernel, kernel.transformed
  height, width = kernel.shape[:2]
  fits = height == width and height % 2 == 1
  require(fits, 'the kernel must be odd and square', kernel.shape)
  kernel = kernel.astype(x.dtype)
  if kernel.shape[0] == 1:
    x, stride, rate = subsample(x, stride), 1, 1
  else:
    x = blank(x)
  if _form.value == 'xla':
    y = convolutions.by_xla(x, kernel, stride, rate)
  else:
    y = _conv2d(x, kernel, cached, stride, rate)
  return checkpoint_name(y, 'conv')


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _conv2d(
  x: jax.Array, kernel: jax.Array, cached: Any, stride: int, rate: int
) -> jax.Array:
  form = _by_platform(
    convolutions.on_cpu,
    lambda x, kernel, _, **own: convolutions.by_xla(x, kernel, **own),
    stride=stride,
    rate=rate,
  )
  return form(x, kernel, cached)


@functools.partial(_conv2d.defjvp, symbolic_zeros=True)
def _conv2d_differential(
  stride: int, rate: int, values: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  x, kernel, cached = values
  y = _conv2d(x, kernel, cached, stride, rate)
  constant = [
    isinstance(dot, jax.custom_derivatives.SymbolicZero)
    for dot in jax.tree.leaves(tangents)
  ]
  x_dot, kernel_dot = (
    jnp.zeros(dot.shape, dot.dtype) if zero else dot
    for dot, zero in zip(tangents[:2], constant, strict=False)
  )
  if cached:
    if not all(constant[1:]):
      raise ValueError(
        'kernels of cache_kernels are for inference: gradients would not reach'
        ' them; take the variables that it was given'
      )
    return y, _conv2d(x_dot, kernel, cached, stride, rate)

  def tangent(x: Any, kernel: Any, x_dot: Any, kernel_dot: Any) -> jax.Array:
    return _conv2d(x_dot, kernel, (), stride, rate) + _conv2d(
      x, kernel_dot, (), stride, rate
    )

  gradients = _by_platform(
    convolutions.gradients_on_cpu,
    convolutions.xla_gradients,
    stride=stride,
    rate=rate,
  )
  arguments = x_dot, kernel_dot
  return y, linear_call(tangent, gradients, (x, kernel), arguments, like=y)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['kernel', 'transformed'],
  meta_fields=['note'],
)
@dataclasses.dataclass(frozen=True)
class CachedKernel:
  """Replaces a kernel in the parameters; adds what CPUs compute from it.

  JAX takes it as the kernel alone, so that other layers may find it, too.
  """

  kernel: jax.Array
  transformed: tuple[jax.Array, ...] = ()
  note: Callable[[Any], None] | None = None

  shape = property(lambda self: self.kernel.shape)
  dtype = property(lambda self: self.kernel.dtype)

  def __jax_array__(self) -> jax.Array:
    """Returns the kernel."""
    return jnp.asarray(self.kernel)


def cache_kernels(
  model: nn.Module, variables: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
  """Computes once what CPU inference would compute from the kernels each time.

  These are the kernel transforms of Winograd's algorithm, 0.2 GB for ResNet-50.
  They take about a second, which pays off after a few dozen images. On other
  platforms there is nothing to gain, and the variables come back unchanged.

  Args:
    model: a `DeepLabV3`, or what takes images and `train=False` as it does.
    variables: the model's variables.
    size: (height, width) of the images. At other sizes the network still works;
      where a transform does not fit a map, the plain kernel is used.

  Returns:
    Variables for `model.apply(..., train=False)`; make them again whenever the
    parameters change. The logits are the same up to rounding.
  """
  variables = dict(variables)
  if jax.default_backend() != 'cpu' or _form.value == 'xla':
    return variables
  uses: dict[tuple[str, ...], Any] = {}
  params = flatten_dict(variables['params'])
  kernels = {
    path: leaf.kernel if isinstance(leaf, CachedKernel) else leaf
    for path, leaf in params.items()
    if path[-1] == 'kernel'
  }
  noted = {
    path: CachedKernel(leaf, note=functools.partial(uses.__setitem__, path))
    for path, leaf in kernels.items()
  }
  jax.eval_shape(
    functools.partial(model.apply, train=False),
    {**variables, 'params': unflatten_dict(params | noted)},
    jnp.zeros((1, *size, len(model.mean)), jnp.uint8),
  )
  transformed = jax.jit(
    lambda kernels: {
      path: convolutions.transform(kernels[path], *use)
      for path, use in uses.items()
    }
  )(kernels)
  cached = {
    path: CachedKernel(kernels[path], arrays)
    for path, arrays in transformed.items()
    if arrays
  }
  return {**variables, 'params': unflatten_dict(params | kernels | cached)}


def subsample(x: jax.Array, stride: int) -> jax.Array:
  """Every `stride`th row and column of [B, H, W, C], from the first on."""
  # Of symbolic sizes, indexing would gather, and give them another name.
  if stride == 1:
    return x
  return lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))


REMATERIALIZATIONS = ('none', 'elementwise', 'block')


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
  """Applies `flax.linen.remat` to a function of a module and arrays.

  The backward pass recomputes what the forward pass did not keep. 'none' keeps
  everything, 'elementwise' the results of convolutions, 'block' only the input.
  The last two also keep batch statistics, so that no sum over devices runs
  twice; on CPUs they need the compiler options of `runtime.host`.
  """
  if policy == 'none':
    return function
  names = jax.checkpoint_policies.save_only_these_names(
    *(['conv'] if policy == 'elementwise' else [])
  )

  def keeps(primitive: Any, *args: Any, **params: Any) -> bool:
    sums = primitive.name in ('reduce_sum', 'psum')
    return sums or names(primitive, *args, **params)

  return nn.remat(function, policy=keeps)


POOL_PADDINGS = ('symmetric', 'same', 'zero')


def max_pool(x: jax.Array, padding: str = 'symmetric') -> jax.Array:
  """Maximum over 3x3 windows at stride 2: [B, H, W, C] -> half, rounded up.

  `padding` 'symmetric' adds a border that never wins. 'same' is TensorFlow's:
  at even sizes, that border only at the bottom and right. 'zero' is Keras's: a
  border of zeros, which wins over negative values.
  """
  x = blank(x, lowest=padding != 'zero')
  if padding == 'zero':
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  same = [(n % 2, 1) for n in x.shape[1:3]]
  pads = {'symmetric': [(1, 1)] * 2, 'same': same, 'zero': 'VALID'}
  return nn.max_pool(x, (3, 3), (2, 2), pads[padding])
