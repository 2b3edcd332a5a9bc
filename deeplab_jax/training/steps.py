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
from deeplab_jax.training import losses
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
  loss: Callable[..., jax.Array] = losses.softmax_cross_entropy,
  label_smoothing: float = 0.0,
  class_weights: Sequence[float] | None = None,
  hardest: float = 1.0,
  accumulate: int = 1,
  ema: float | None = None,
  freeze: Sequence[str] = (),
  freeze_steps: int | None = None,
  dropout: float = 0.0,
  seed: int = 0,
  axis_name: str | None = AXIS_NAME,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one training step on a batch.

  The loss is the mean over the batch's valid pixels on all devices, each
  weighted by its class.

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
    loss: a function like those in `losses.LOSSES`.
    label_smoothing: passed on to `loss`.
    class_weights: see `losses.pixel_weights`.
    hardest: share of pixels that `losses.hardest_pixels` keeps; 1 keeps all.
    accumulate: number k of micro-batches, b / k images each, that one device
      computes one after the other to save memory. Sums over all of them are
      divided once, so with `freeze_bn` the step is that of the whole batch.
      Without, each has the batch statistics of its own images, and the running
      ones move k times.
    ema: decay of `state.ema`, at most (1 + step) / (10 + step) as in
      `tf.train.ExponentialMovingAverage`; None leaves them as they are.
    freeze: patterns of parameters that stay as they are, see
      `optimizers.frozen_parameters`.
    freeze_steps: freeze up to this step. The optimizer then sees all gradients
      from the start; with None it sees none, and keeps its moments.
    dropout: share of the channels that each image lacks in the class layer; the
      others are scaled up by 1 / (1 - dropout) (Tompson et al., 2015).
    seed: fixes, with the step and an image's place, which ones.
    axis_name: name of the mapped device axis; None if there is none.

  Returns the next state, and a dict of scalars that are equal on every device:
  float32 `loss` and `grad_norm` (global L2, before clipping), and int32
  `valid_pixels`, the number of pixels that count in the loss.
  """
  losses.check_settings(label_smoothing, hardest, class_weights)
  frozen = frozen_parameters(state.params, freeze)

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
      mutable=['batch_stats'],
    )
    label = batch['label']
    each = loss(logits, label, ignore_label, label_smoothing)
    weights = losses.pixel_weights(label, class_weights, ignore_label)
    if hardest < 1:  # by the loss alone: a weight makes no pixel harder
      weights *= losses.hardest_pixels(each, weights > 0, hardest)
    total = weights.sum()
    if accumulate == 1:  # dividing here spares a pass over the gradients
      total = _across(lax.psum, total, axis_name)
    value = (weights * each).sum()
    if accumulate == 1:
      value /= jnp.where(total > 0, total, 1)
    return value, (updated['batch_stats'], total, (weights > 0).sum())

  gradient = jax.value_and_grad(loss_of, has_aux=True)
  if accumulate == 1:
    found, grads = gradient(state.params, state.batch_stats, batch)
    mean, (batch_stats, _, valid) = found
    mean, grads = _across(lax.psum, (mean, grads), axis_name)
  else:
    sums, batch_stats, valid = _in_turn(gradient, state, batch, accumulate)
    total, *sums = _across(lax.psum, sums, axis_name)
    divisor = jnp.where(total > 0, total, 1)
    mean, grads = jax.tree.map(lambda x: x / divisor, sums)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params, t = optax.apply_updates(state.params, updates), state.step
  if freeze:
    still = jnp.bool_(True) if freeze_steps is None else t < freeze_steps

    def keep(new: jax.Array, old: jax.Array, fixed: bool) -> jax.Array:
      return jnp.where(still, old, new) if fixed else new

    params = jax.tree.map(keep, params, state.params, frozen)
    if freeze_steps is None:
      moments = optax.tree.map_params(
        optimizer,
        lambda _, fixed: fixed,
        opt_state,
        frozen,
        transform_non_params=lambda _: False,
      )
      opt_state = jax.tree.map(keep, opt_state, state.opt_state, moments)
  averages = state.ema
  if ema is not None:
    rate = 1 - jnp.minimum(ema, (1 + t) / (10 + t))
    averages = jax.tree.map(lambda a, x: a + rate * (x - a), averages, params)
  state = TrainState(
    step=state.step + 1,
    params=params,
    batch_stats=_across(lax.pmean, batch_stats, axis_name),
    opt_state=opt_state,
    ema=averages,
  )
  return state, {
    'loss': mean,
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
) -> tuple[Any, Any, jax.Array]:
  """Adds up `count` micro-batches: total weight, loss and gradients."""

  def add(carry: Any, part: Any) -> tuple[Any, None]:
    sums, stats, valid = carry
    found, grads = gradient(state.params, stats, part)
    value, (stats, total, more) = found
    sums = jax.tree.map(jnp.add, sums, (total, value, grads))
    return (sums, stats, valid + more), None

  # Each takes images from all over the batch, which then stays where it is if
  # devices share this axis.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
  )
  zero, zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
  start = (zero, zero, zeros), state.batch_stats, jnp.zeros((), jnp.int32)
  return lax.scan(add, start, parts)[0]


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
