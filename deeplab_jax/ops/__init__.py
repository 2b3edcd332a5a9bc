"""What the network computes with: a door with one switch.

Every function here has two forms that give the same numbers: XLA's own
operations, and faster ones for CPUs. A program takes the forms of the platform
that it is compiled for, whatever the machine that traces it:

```
with ops.use('xla'):  # XLA's forms on CPUs too, as in exported programs
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

__all__ = [
  'CachedKernel',
  'cache_kernels',
  'conv2d',
  'max_pool',
  'padded',
  'remat',
  'use',
  'within',
]

FORMS = ('xla', 'cpu')
_form = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use(form: str) -> Iterator[None]:
  """Takes one form on every platform: 'xla' or 'cpu'.

  Raises:
    ValueError: for another form.
  """
  if form not in FORMS:
    raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form!r}')
  with _form(form):
    yield


def _by_platform(
  cpu: Callable[..., Any], xla: Callable[..., Any]
) -> Callable[..., Any]:
  if _form.value is not None:
    return cpu if _form.value == 'cpu' else xla
  return functools.partial(lax.platform_dependent, cpu=cpu, default=xla)


def conv2d(
  x: jax.Array, kernel: Any, stride: int = 1, rate: int = 1
) -> jax.Array:
  """Convolves with symmetric zero padding of `rate * (k - 1) / 2` pixels.

  Args:
    x: [B, H, W, Cin].
    kernel: [k, k, Cin, Cout], k odd; or what `cache_kernels` made of it.
    stride: distance of output pixels, in input pixels.
    rate: distance of the kernel's taps, in input pixels (atrous convolution).

  Returns:
    [B, ceil(H / stride), ceil(W / stride), Cout], of the type of x. It has
    derivatives of every order, in forward and in reverse mode.

  Raises:
    ValueError: for a kernel that is not odd and square.
  """
  cached: tuple[jax.Array, ...] = ()
  if isinstance(kernel, CachedKernel):
    if kernel.note is not None:
      kernel.note((x.shape, x.dtype, stride, rate))
    kernel, cached = kernel.kernel, kernel.transformed
  if kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
    raise ValueError(f'the kernel must be odd and square, got {kernel.shape}')
  kernel = kernel.astype(x.dtype)
  if kernel.shape[0] == 1:
    x, stride, rate = x[:, ::stride, ::stride], 1, 1
  else:
    x = blank(x)
  if _form.value == 'xla':
    y = convolutions.by_xla(x, kernel, stride, rate)
  elif cached:
    y = _cached_conv2d(x, kernel, cached, stride, rate)
  else:
    y = _conv2d(x, kernel, stride, rate)
  return checkpoint_name(y, 'conv')


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv2d(
  x: jax.Array, kernel: jax.Array, stride: int, rate: int
) -> jax.Array:
  own = functools.partial(functools.partial, stride=stride, rate=rate)
  form = _by_platform(own(convolutions.on_cpu), own(convolutions.by_xla))
  return form(x, kernel)


@_conv2d.defjvp
def _conv2d_differential(
  stride: int, rate: int, values: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  y = _conv2d(*values, stride, rate)
  own = functools.partial(functools.partial, stride=stride, rate=rate)

  def tangent(x: Any, kernel: Any, x_dot: Any, kernel_dot: Any) -> jax.Array:
    return _conv2d(x_dot, kernel, stride, rate) + _conv2d(
      x, kernel_dot, stride, rate
    )

  gradients = _by_platform(
    own(convolutions.gradients_on_cpu), own(convolutions.xla_gradients)
  )
  return y, linear_call(tangent, gradients, values, tangents, like=y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _cached_conv2d(
  x: jax.Array, kernel: jax.Array, cached: Any, stride: int, rate: int
) -> jax.Array:
  form = _by_platform(
    functools.partial(convolutions.cached_on_cpu, stride=stride, rate=rate),
    lambda x, kernel, _: convolutions.by_xla(x, kernel, stride, rate),
  )
  return form(x, kernel, cached)


@functools.partial(_cached_conv2d.defjvp, symbolic_zeros=True)
def _cached_conv2d_differential(
  stride: int, rate: int, values: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
  x, kernel, cached = values
  constant = jax.custom_derivatives.SymbolicZero
  if not all(
    isinstance(dot, constant) for dot in jax.tree.leaves(tangents[1:])
  ):
    raise ValueError(
      'kernels of cache_kernels are for inference: gradients would not reach'
      ' them; take the variables that it was given'
    )
  y = _cached_conv2d(x, kernel, cached, stride, rate)
  if isinstance(tangents[0], constant):
    return y, jnp.zeros_like(y)
  return y, _cached_conv2d(tangents[0], kernel, cached, stride, rate)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['kernel', 'transformed'],
  meta_fields=['note'],
)
@dataclasses.dataclass(frozen=True)
class CachedKernel:
  """A kernel in the place of the kernel, with what a CPU computes from it."""

  kernel: jax.Array
  transformed: tuple[jax.Array, ...] = ()
  note: Callable[[Any], None] | None = None


def cache_kernels(
  model: nn.Module, variables: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
  """Computes once what inference on CPUs computes from the kernels each time.

  These are the transforms of Winograd's algorithm, 0.2 GB for ResNet-50. It
  takes about a second, which pays from some dozens of images on. Elsewhere
  there is nothing to gain, and the variables stay as they are.

  Args:
    model: is applied to images [B, H, W, 3] with `train=False`.
    variables: of the model.
    size: (height, width) of the images. At other sizes, kernels that do not
      suit a map are used as they are.

  Returns:
    Variables for `model.apply(..., train=False)`, until the parameters change.
    The logits are the same up to rounding.
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
    jnp.zeros((1, *size, 3), jnp.uint8),
  )

  @jax.jit
  def transform(kernels: Any) -> Any:
    return {
      path: convolutions.transform(kernels[path], *noted_use)
      for path, noted_use in uses.items()
    }

  cached = {
    path: CachedKernel(kernels[path], transformed)
    for path, transformed in transform({p: kernels[p] for p in uses}).items()
    if transformed
  }
  return {**variables, 'params': unflatten_dict(params | kernels | cached)}


REMATERIALIZATIONS = ('none', 'elementwise', 'block')


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
  """`flax.linen.remat` of a function of a module and arrays.

  The backward pass computes again what it does not keep. 'elementwise' keeps
  the results of convolutions, 'block' only the input; both keep batch
  statistics, so that no sum over devices runs twice. 'none' keeps everything.
  On CPUs it needs the compiler options of `runtime.host`.
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

  `padding` 'symmetric' adds a border that never wins; 'same' is TensorFlow's,
  which at even sizes has one at the far end only; 'zero' adds a border of
  zeros, as Keras does, which wins over negative values.
  """
  x = blank(x, lowest=padding != 'zero')
  if padding == 'zero':
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  pads = {'symmetric': [(1, 1)] * 2, 'same': 'SAME', 'zero': 'VALID'}
  return nn.max_pool(x, (3, 3), (2, 2), pads[padding])
