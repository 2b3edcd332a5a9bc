"""Checkpoints that describe themselves, through Orbax.

`WORKDIR/checkpoints/STEP` holds the state as numpy arrays, and as JSON the
settings of the model, the classes and the measures that it reached.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deeplab_jax.errors import UserError

_UNEVALUATED = -1.0


class Checkpoints:
  """The checkpoints of one workdir: the latest one and the best by mIoU."""

  def __init__(self, workdir: str | Path, *, read_only: bool = False) -> None:
    """Opens the checkpoints, of another run with `read_only`."""
    policies = ocp.checkpoint_managers
    self._directory = Path(workdir).absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._directory,
      item_names=('state', 'metadata'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(1),
            policies.BestN(get_metric_fn=lambda m: m['miou'], n=1),
          ]
        ),
        best_fn=lambda metrics: metrics['miou'],
        cleanup_tmp_directories=jax.process_count() == 1 and not read_only,
        # not Orbax's own `read_only`, which warns of itself three times
        create=not read_only,
      ),
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None without one."""
    return self._manager.latest_step()

  def step_named(self, name: str) -> int:
    """The step for 'best', 'latest' or a number.

    Raises:
      UserError: if there is no such checkpoint.
    """
    steps = sorted(self._manager.all_steps())
    if not steps:
      raise UserError(
        f'no checkpoint in {self._directory}; train there first, or give the'
        ' --workdir of a training run'
      )
    if name == 'best':
      return self._manager.best_step() or steps[-1]
    if name == 'latest':
      return steps[-1]
    if not name.isdigit() or int(name) not in steps:
      raise UserError(
        f'config.eval.step={name} is not in {self._directory}, which has'
        f' {", ".join(map(str, steps))}'
      )
    return int(name)

  def save(self, state: Any, metadata: dict[str, Any]) -> None:
    """Starts to save, unless the step is there; `close` waits for the end.

    Args:
      state: tree of arrays with a field `step`.
      metadata: JSON values; `metadata['measures']['miou']` ranks the
        checkpoint, which without measures is only ever the latest.
    """
    state = jax.device_get(state)
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    miou = (metadata.get('measures') or {}).get('miou')
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        metadata=ocp.args.JsonSave(metadata),
      ),
      metrics={'miou': _UNEVALUATED if miou is None else miou},
    )

  def metadata(self, step: int) -> dict[str, Any]:
    """What `save` was given as `metadata`."""
    with self._readable(step):
      return self._manager.restore(
        step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
      ).metadata

  def restore(self, step: int, template: Any) -> Any:
    """Restores the state into numpy arrays of the template's structure."""
    template = jax.device_get(template)
    with self._readable(step):
      return self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeRestore(template)),
      ).state

  def restore_variables(self, step: int) -> dict[str, Any]:
    """Restores what `model.apply` takes: `params` and `batch_stats`."""
    with self._readable(step):
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())
      ).state
    return {key: state[key] for key in ('params', 'batch_stats')}

  @contextlib.contextmanager
  def _readable(self, step: int) -> Any:
    try:
      yield
    except (ValueError, KeyError, OSError, TypeError) as error:
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise UserError(
        f'{self._directory / str(step)} cannot be restored: {first}; if it was'
        ' damaged, remove that folder to fall back on the checkpoint before'
      ) from error

  def wait(self) -> None:
    """Waits until what `save` started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and frees the manager."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def describe(model: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
  """Metadata of a checkpoint: the arguments of `deeplab_v3`, and the data set.

  Args:
    model: settings by name, JSON values.
    dataset: `DatasetInfo.to_json()`.
  """
  return {
    'model': {**model, 'num_classes': len(dataset['classes'])},
    'dataset': dataset,
  }


def preset_of(metadata: dict[str, Any]) -> str:
  """The preset of a checkpoint's network, by what `describe` made."""
  return metadata['model'].get('preset') or 'paper'


def check_same_architecture(
  saved: dict[str, Any], asked: dict[str, Any], workdir: str | Path
) -> None:
  """Compares the preset and what shapes the variables, of two `describe`.

  Raises:
    UserError: naming the settings that differ.
  """
  differences = []
  old, new = preset_of(saved), preset_of(asked)
  if old != new:
    differences.append(f'preset {old} there, {new} asked for')
  for key in (
    'backbone',
    'width',
    'aspp_features',
    'aspp_rates',
    'num_classes',
  ):
    old, new = saved['model'][key], asked['model'][key]
    if (len(old) != len(new)) if key == 'aspp_rates' else (old != new):
      differences.append(f'{key} {old} there, {new} asked for')
  if differences:
    raise UserError(
      f'the checkpoint in {workdir} is of another network:'
      f' {"; ".join(differences)}. Use another --workdir, or that network'
    )
