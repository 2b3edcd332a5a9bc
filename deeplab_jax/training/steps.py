"""One training step: a pure function, and that function under pmap.

Under `jax.pmap` or `jax.shard_map(check_vma=False)`, `axis_name` is the mapped
axis; under plain `jax.jit` it is None.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax import lax

from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.training import objective
from deeplab_jax.training.optimizers import frozen_parameters


@struct.dataclass
class TrainState:
  """What training changes; replicated, without a device axis."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any = None  # averages of the parameters, if they are kept

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes; with averages of the parameters, those."""
    params = self.params if self.ema is None else self.ema
    return {'params': params, 'batch_stats': self.batch_stats}

  def with_ema(self, keep: bool) -> 'TrainState':
    """Starts averages at the parameters unless it has them, or drops them."""
    # Copies: a step cannot be given, and take over, an array twice.
    copy = functools.partial(jax.tree.map, np.array)
    ema = copy(self.variables['params']) if keep else None
    return dataclasses.replace(self, ema=ema)


def draw_variables(model: nn.Module, key: jax.Array) -> Any:
  """Draws what `model.apply` takes; no shape depends on the size of images."""
  return model.init(key, jnp.zeros((1, 64, 64, len(model.mean))), train=False)


def create_state(
  model: nn.Module, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Draws the initial state from `seed` alone."""

  def create(key: jax.Array) -> TrainState:
    variables = draw_variables(model, key)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=variables['params'],
      batch_stats=variables['batch_stats'],
      opt_state=optimizer.init(variables['params']),
    )

  # This program runs once: optimizing it would only add 25 s on a CPU.
  options = None
  if jax.default_backend() == 'cpu':
    options = {'xla_backend_optimization_level': 0}
  return jax.jit(create, compiler_options=options)(jax.random.key(seed))


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  ignore_label: int = 255,
  freeze_bn: bool = False,
  auxiliary: float = 0.0,
  accumulate: int = 1,
  ema: float | None = None,
  freeze: Sequence[str] = (),
  freeze_steps: int | None = None,
  dropout: float = 0.0,
  seed: int = 0,
  axis_name: str | None = AXIS_NAME,
  **of_loss: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one training step on a batch.

  Args:
    state: the same on every device.
    batch: this device's `image` [b, H, W, C] and `label` uint8
      [b, H, W]; for dropout also `place` int32 [b], each image's place in the
      batch of all devices.
    model: maps images to logits [b, H, W, C]. If it averages batch statistics
      over an axis, that must be `axis_name`.
    optimizer: the optimizer that made `state.opt_state`.
    ignore_label: the label of pixels that are left out of the loss.
    freeze_bn: normalize by the running statistics and do not update them.
    auxiliary: weight of the auxiliary head's loss, of the same terms; 0 if the
      model has no such head.
    accumulate: number k of micro-batches, b / k images each, that one device
      computes one after the other to save memory. Each counts by the weight of
      its pixels, so with `freeze_bn` and losses of pixels the step is that of
      the whole batch. Losses of regions are those of each micro-batch. Without
      `freeze_bn`, each has the batch statistics of its own images, and the
      running ones move k times.
    ema: decay of `state.ema`, at most (1 + step) / (10 + step) as in
      `tf.train.ExponentialMovingAverage`; None leaves them as they are.
    freeze: patterns of parameters that stay as they are, see
      `optimizers.frozen_parameters`.
    freeze_steps: freeze up to this step. The optimizer then sees all gradients
      from the start, and clips those of frozen parameters apart; with None they
      are not computed.
    dropout: share of the channels that each image lacks in the class layer; the
      others are scaled up by 1 / (1 - dropout) (Tompson et al., 2015).
    seed: fixes, with the step and an image's place, which ones.
    axis_name: name of the mapped device axis; None if there is none.
    **of_loss: `terms`, `label_smoothing`, `class_weights` and `hardest` of
      `objective.batch_loss`.

  Returns the next state, and a dict of scalars that are equal on every device:
  float32 `loss` and `grad_norm` (global L2, before clipping), and int32
  `valid_pixels`, the number of pixels that count in the loss. Of several terms,
  `loss_NAME` is each before its weight, as is `loss_auxiliary`.
  """
  frozen = frozen_parameters(state.params, freeze)

  @jax.custom_gradient  # the gradients are summed over the devices later
  def across(x: jax.Array) -> tuple[jax.Array, Any]:
    return _across(lax.psum, x, axis_name), lambda gradient: gradient

  of_loss |= {'ignore_label': ignore_label, 'across': across}

  def loss_of(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, Any]:
    if freeze_steps is None:  # their gradients are then not computed
      params = jax.tree.map(
        lambda x, fixed: lax.stop_gradient(x) if fixed else x, params, frozen
      )
    variables = {'params': params, 'batch_stats': stats}
    if dropout:
      channels = params['logits']['kernel'].shape[-2]
      scale = _dropped(dropout, channels, seed, state.step, batch['place'])
      variables['dropout'] = {'scale': scale}
    logits, updated = model.apply(
      variables,
      batch['image'],
      train=not freeze_bn,
      mutable=['batch_stats', *['intermediates'] * (auxiliary > 0)],
    )
    label = batch['label']
    values, total, valid = objective.batch_loss(logits, label, **of_loss)
    if auxiliary:
      second = updated['intermediates']['auxiliary_logits'][0]
      more = objective.batch_loss(second, label, **of_loss)[0]['loss']
      whole = values['loss'] + auxiliary * more
      values |= {'loss': whole, 'loss_auxiliary': more}
    minimized = values['loss'] * (1 if accumulate == 1 else total)
    return minimized, (updated['batch_stats'], values, total, valid)

  gradient = jax.grad(loss_of, has_aux=True)
  if accumulate == 1:
    grads, found = gradient(state.params, state.batch_stats, batch)
    batch_stats, values, _, valid = found
    grads = _across(lax.psum, grads, axis_name)
  else:
    grads, batch_stats, found = _in_turn(gradient, state, batch, accumulate)
    values, weights, valid = found
    total, valid = weights.sum(), valid.sum()
    sums = jax.tree.map(lambda x: (x * weights).sum(), values)
    sums = sums, _across(lax.psum, grads, axis_name)
    divisor = jnp.where(total > 0, total, 1)
    values, grads = jax.tree.map(lambda x: x / divisor, sums)
  t, apart = state.step, {}
  held = freeze_steps is None or t < freeze_steps
  if freeze and freeze_steps:
    apart['held'] = jax.tree.map(lambda fixed: fixed & held, frozen)
  update = optax.with_extra_args_support(optimizer).update
  updates, opt_state = update(grads, state.opt_state, state.params, **apart)
  params = jax.tree.map(
    lambda new, old, fixed: jnp.where(held, old, new) if fixed else new,
    optax.apply_updates(state.params, updates),
    state.params,
    frozen,
  )
  averages = state.ema
  if ema is not None:
    rate = 1 - jnp.minimum(ema, (1 + t) / (10 + t))
    averages = jax.tree.map(lambda a, x: a + rate * (x - a), averages, params)
  state = TrainState(
    step=t + 1,
    params=params,
    batch_stats=_across(lax.pmean, batch_stats, axis_name),
    opt_state=opt_state,
    ema=averages,
  )
  return state, {
    **values,
    'grad_norm': optax.tree.norm(grads),
    'valid_pixels': _across(lax.psum, valid, axis_name),
  }


def _dropped(
  rate: float, channels: int, seed: int, step: jax.Array, places: jax.Array
) -> jax.Array:
  """Draws a factor per image and channel [b, 1, 1, C]: 0 or 1 / (1 - rate)."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
  shape = 1, 1, channels
  draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=shape)
  return jax.vmap(draw)(keys) / (1 - rate)


def _in_turn(
  gradient: Callable[..., Any], state: TrainState, batch: Any, count: int
) -> tuple[Any, Any, Any]:
  """Adds up gradients of `count` micro-batches; returns what each found."""

  def add(carry: Any, part: Any) -> tuple[Any, Any]:
    sums, stats = carry
    grads, (stats, *found) = gradient(state.params, stats, part)
    return (jax.tree.map(jnp.add, sums, grads), stats), found

  # Each takes images from all over the batch, which then stays where it is if
  # devices share this axis.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
  )
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (grads, stats), found = lax.scan(add, (zeros, state.batch_stats), parts)
  return grads, stats, found


def _across(
  collective: Callable[[Any, str], Any], tree: Any, axis_name: str | None
) -> Any:
  """Combines what the devices hold; for one device XLA would add a copy."""
  if axis_name is None or lax.axis_size(axis_name) == 1:
    return tree
  return collective(tree, axis_name)


def pmap_train_step(**settings: Any) -> Callable[..., Any]:
  """Maps `train_step` over all devices; it donates the state.

  The state has no device axis; the batch and the metrics have one.
  """
  step, axes = functools.partial(train_step, **settings), (None, 0)
  return distributed.together(
    jax.pmap(step, AXIS_NAME, in_axes=axes, out_axes=axes, donate_argnums=0)
  )
