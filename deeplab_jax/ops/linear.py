"""Linear functions whose transpose is written out, in all modes of JAX.

`jax.custom_derivatives.linear_call` does the same for first derivatives alone:
it has no rule for residuals that have a derivative, and none for `jax.vmap`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_linear_call_p = Primitive('linear_call')


def linear_call(
  function: Callable[..., jax.Array],
  transpose: Callable[..., Sequence[jax.Array]],
  residuals: Sequence[jax.Array],
  arguments: Sequence[jax.Array],
  like: jax.Array,
) -> jax.Array:
  """`function(*residuals, *arguments)`, transposed as it is told to.

  Args:
    function: linear in `arguments`. JAX derives it where a derivative of
      second order needs it.
    transpose: maps (*residuals, gradient of the result) to the gradients of
      the arguments, all of them even where some are not asked for.
    residuals: what the function is not linear in; kept for the transpose.
    arguments: what the function is linear in.
    like: an array of the result's shape and type; its values are not used.
  """
  return _linear_call_p.bind(
    *residuals,
    *arguments,
    function=function,
    transpose=transpose,
    count=len(residuals),
    result=jax.typeof(like),
  )


def _evaluate(*values: jax.Array, function: Any, **_: Any) -> jax.Array:
  return function(*values)


def _differentiate(
  values: tuple[jax.Array, ...],
  tangents: tuple[Any, ...],
  *,
  function: Any,
  **_: Any,
) -> tuple[jax.Array, jax.Array]:
  return jax.jvp(function, values, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(
  gradient: jax.Array, *values: Any, transpose: Any, count: int, **_: Any
) -> list[jax.Array | None]:
  gradients = transpose(*values[:count], gradient)
  own = zip(gradients, values[count:], strict=True)
  asked = [g if ad.is_undefined_primal(value) else None for g, value in own]
  return [*[None] * count, *asked]


def _batch(
  values: Sequence[jax.Array],
  axes: Sequence[int | None],
  *,
  function: Any,
  transpose: Any,
  count: int,
  result: Any,
) -> tuple[jax.Array, int]:
  size = next(
    value.shape[axis]
    for value, axis in zip(values, axes, strict=True)
    if axis is not None
  )
  # All arguments get the axis, so that all gradients have it; JAX sums those
  # of what it was added to.
  arguments = [
    batching.bdim_at_front(value, axis, size)
    for value, axis in zip(values[count:], axes[count:], strict=True)
  ]
  kept = axes[:count]
  y = _linear_call_p.bind(
    *values[:count],
    *arguments,
    function=jax.vmap(function, (*kept, *[0] * len(arguments))),
    transpose=jax.vmap(transpose, (*kept, 0)),
    count=count,
    result=result.update(shape=(size, *result.shape)),
  )
  return y, 0


_linear_call_p.def_impl(_evaluate)
_linear_call_p.def_abstract_eval(lambda *_, result, **__: result)
mlir.register_lowering(
  _linear_call_p, mlir.lower_fun(_evaluate, multiple_results=False)
)
ad.primitive_jvps[_linear_call_p] = _differentiate
ad.primitive_transposes[_linear_call_p] = _transpose
batching.primitive_batchers[_linear_call_p] = _batch
