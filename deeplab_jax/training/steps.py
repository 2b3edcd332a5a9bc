"""One step of training, and its pmap.

The step is a pure function of its arguments. Batches hold `image` uint8
[b, H, W, 3] RGB and `label` uint8 [b, H, W]; under pmap both have the device
axis in front.

It runs under `jax.pmap` and `jax.shard_map` with the name of the mapped axis,
and under plain `jax.jit` with `axis_name` None:

```
step = jax.jit(
  functools.partial(
    train_step, model=model, optimizer=optimizer, axis_name=None
  ),
  donate_argnums=0,
)
state, measures = step(state, batch)
```
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax

from deeplab_jax.runtime.distributed import AXIS_NAME
from deeplab_jax.training.losses import (
  check_settings,
  hardest_pixels,
  pixel_weights,
  softmax_cross_entropy,
)


@struct.dataclass
class TrainState:
  """What training carries from step to step; replicated, no device axis."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
  model: nn.Module, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Initial state: fresh variables, drawn from `seed` alone."""

  def create(key: jax.Array) -> TrainState:
    # The size matters to no parameter.
    variables = model.init(key, jnp.zeros((1, 64, 64, 3)), train=False)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=variables['params'],
      batch_stats=variables['batch_stats'],
      opt_state=optimizer.init(variables['params']),
    )

  # It runs once: optimising it takes 25 s of compiling on CPU for nothing.
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
  class_weights: Sequence[float] | None = None,
  hardest: float = 1.0,
  label_smoothing: float = 0.0,
  axis_name: str | None = AXIS_NAME,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Updates the state by one batch.

  The loss is the mean over the valid pixels of the batch of all devices,
  weighted by the classes if they have weights.

  Args:
    state: the same on every device.
    batch: this device's share.
    model: maps images to logits [b, H, W, C]. Where it averages batch
      statistics over an axis, that is `axis_name`.
    optimizer: the one that made `state.opt_state`.
    ignore_label: marks pixels that have no part in the loss.
    freeze_bn: normalise by the running statistics and leave them as they are.
    class_weights: one for each class; None for equal ones.
    hardest: share of each image's pixels of a weight above 0 that have a part
      in the loss, those of the largest cross-entropy, see `hardest_pixels`.
    label_smoothing: see `softmax_cross_entropy`.
    axis_name: of the mapped device axis; None where there is none, as under
      plain `jax.jit`. `jax.shard_map` needs `check_vma=False`.

  Returns:
    The next state, and scalars that are equal on every device: float32 `loss`
    and `grad_norm` (global L2, before clipping), and int32 `valid_pixels`, the
    number of pixels that have a part in the loss.
  """
  check_settings(label_smoothing, hardest, class_weights)

  def loss_of(params: Any) -> tuple[jax.Array, Any]:
    logits, updated = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      batch['image'],
      train=not freeze_bn,
      mutable=['batch_stats'],
    )
    losses = softmax_cross_entropy(
      logits, batch['label'], ignore_label, label_smoothing
    )
    weighted, weights = _weigh(
      losses, batch['label'], ignore_label, class_weights, hardest
    )
    total = _across(lax.psum, weights.sum(), axis_name)
    loss = weighted.sum() / jnp.where(total > 0, total, 1)
    return loss, (updated['batch_stats'], (weights > 0).sum())

  (loss, (batch_stats, valid)), gradients = jax.value_and_grad(
    loss_of, has_aux=True
  )(state.params)
  loss, gradients = _across(lax.psum, (loss, gradients), axis_name)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=_across(lax.pmean, batch_stats, axis_name),
    opt_state=opt_state,
  )
  return state, {
    'loss': loss,
    'grad_norm': optax.global_norm(gradients),
    'valid_pixels': _across(lax.psum, valid, axis_name),
  }


def _across(
  collective: Callable[[Any, str], Any], tree: Any, axis_name: str | None
) -> Any:
  """Combines what the devices hold; of one alone XLA would make a copy.

  What one device holds then stays mapped for JAX: `pmap` takes it, `vmap` with
  `out_axes=None` does not.
  """
  if axis_name is None or lax.axis_size(axis_name) == 1:
    return tree
  return collective(tree, axis_name)


def _weigh(
  losses: jax.Array,
  labels: jax.Array,
  ignore_label: int,
  class_weights: Sequence[float] | None,
  hardest: float,
) -> tuple[jax.Array, jax.Array]:
  """Losses times weights, and the weights, of each pixel."""
  if class_weights is None:  # the losses are 0 at void already
    weights, weighted = labels != ignore_label, losses
  else:
    weights = pixel_weights(labels, class_weights, ignore_label)
    weighted = weights * losses
  if hardest < 1:
    # By the cross-entropy alone: a weight makes no pixel harder.
    kept = hardest_pixels(losses, weights > 0, hardest)
    weighted, weights = weighted * kept, weights * kept
  return weighted, weights


def pmap_train_step(**settings: Any) -> Callable[..., Any]:
  """`train_step` over all devices; its argument `state` is donated.

  The state goes in and comes out without a device axis, batch and measures
  with one.
  """
  return jax.pmap(
    functools.partial(train_step, **settings),
    axis_name=AXIS_NAME,
    in_axes=(None, 0),
    out_axes=(None, 0),
    donate_argnums=0,
  )
