"""Imports weights into a workdir, to evaluate, predict or train on."""

import copy
import functools
import logging
from collections.abc import Collection
from pathlib import Path

import jax
import ml_collections
import optax

from deeplab_jax import build
from deeplab_jax.config import (
  from_json,
  get_config,
  to_json,
)
from deeplab_jax.data.datasets import DATASETS, DatasetInfo
from deeplab_jax.models.deeplab import PRESETS, deeplab_v3
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.training import steps
from deeplab_jax.training.writers import write_json
from deeplab_jax.weights import checkpoints
from deeplab_jax.weights.load import (
  Pretrained,
  open_pretrained,
  own_checkpoint,
)

log = logging.getLogger(__name__)

_DEFAULT_SOURCE = 'keras'


def import_weights(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Writes a checkpoint of step 0 with the weights of `config.init_from`.

  Prints what was loaded, what stayed as initialised and what was not used.
  With `config.list` it prints where each array would go, and writes nothing.

  Raises:
    UserError: if the source cannot be read, does not fit the configuration, or
      the workdir is in use.
  """
  pretrained, config = open_source(config)
  if config.list:
    print(f'{pretrained.names}\npreset: {config.model.preset}')
    return
  _check_unused(workdir)
  _adopt_data(config)
  info = _dataset_info(config, pretrained)
  with naming('config.model'):
    model = deeplab_v3(num_classes=info.num_classes, **config.model)
  # Without an optimizer: the state of any is the initial one at step 0.
  state = initialize(
    pretrained,
    steps.create_state(model, optax.identity(), config.seed),
    config,
  )
  with checkpoints.Checkpoints(workdir) as saved:
    saved.save(
      state, checkpoints.describe(to_json(config)['model'], info.to_json())
    )
  if distributed.is_first_process():
    write_json(workdir / 'config.json', to_json(config))
    print(f'{workdir} holds the weights for --mode=eval and --mode=predict')
    if config.data == get_config().data:
      print('eval needs a data set of these classes: --config.data.*')


def _adopt_data(config: ml_collections.ConfigDict) -> None:
  """Takes the data set of a run of this project, unless another was named."""
  own = own_checkpoint(Path(config.init_from).expanduser())
  if own and config.data == get_config().data:
    saved = own[0] / 'config.json'
    if saved.exists():
      config.data.update(from_json(saved).data)


def _check_unused(workdir: Path) -> None:
  if not (workdir / 'checkpoints').is_dir():
    return
  with checkpoints.Checkpoints(workdir) as saved:
    if saved.latest_step is not None:
      raise UserError(
        f'{workdir} has a checkpoint of step {saved.latest_step}; import into'
        ' another --workdir'
      )


def initialize(
  pretrained: Pretrained,
  state: steps.TrainState,
  config: ml_collections.ConfigDict,
) -> steps.TrainState:
  """Puts the weights into a fresh state, and reports to the screen."""
  allow = [name.strip() for name in config.init_allow.split(',') if name]
  variables, report = pretrained.merge_into(
    jax.device_get(state.variables), allow
  )
  _open.cache_clear()
  if distributed.is_first_process():
    preset = ' or '.join(pretrained.presets)
    log.info('weights of %s, preset %s\n%s', pretrained.source, preset, report)
  return state.replace(**variables)


def open_source(
  config: ml_collections.ConfigDict,
) -> tuple[Pretrained, ml_collections.ConfigDict]:
  """Reads `config.init_from`, and completes the settings of the model by it.

  Returns:
    The weights, and a copy of the configuration with their preset.

  Raises:
    UserError: if the source cannot be read or the configuration contradicts it.
  """
  config = copy.deepcopy(config)
  config.init_from = config.init_from or _DEFAULT_SOURCE
  pretrained = _open(config.init_from, config.model.backbone)
  if pretrained.dataset:  # refused where void was trained as a class
    with naming(f'config.init_from={config.init_from}'):
      DatasetInfo.from_json(pretrained.dataset)
  model = config.model
  model.preset = pretrained.preset_for(model.preset)
  epsilon = pretrained.settings.get(
    'bn_epsilon', PRESETS[model.preset]['bn_epsilon']
  )
  model.bn_epsilon = model.bn_epsilon or epsilon
  wanted = {**pretrained.settings, 'bn_epsilon': epsilon}
  contradictions = [
    f'config.model.{key}={model[key]} (there {value})'
    for key, value in wanted.items()
    if model[key] != value
  ]
  if contradictions:
    looks = pretrained.settings.get('backbone', 'another network')
    raise UserError(
      f'{pretrained.source} looks like {looks}, which contradicts'
      f' {", ".join(contradictions)}'
    )
  return pretrained, config


@functools.lru_cache(maxsize=1)
def _open(source: str, backbone: str) -> Pretrained:
  """Reads a source once for its settings and its arrays."""
  return open_pretrained(source, backbone=backbone)


def adopt_settings(
  config: ml_collections.ConfigDict, said: Collection[str]
) -> None:
  """Makes the model of the embedded default that of `config.init_from`.

  Args:
    config: changed in place.
    said: keys that were given on the command line and stay, 'model.width'.
  """
  backbone = 'resnet50'
  if 'model.backbone' in said:
    backbone = config.model.backbone
  source = config.init_from or _DEFAULT_SOURCE
  settings = _open(source, backbone).settings
  for key, value in {'aspp_features': 256, **settings}.items():
    if f'model.{key}' not in said:
      config.model[key] = value


def _dataset_info(
  config: ml_collections.ConfigDict, pretrained: Pretrained
) -> DatasetInfo:
  """What the classes mean: by the source, unless a data set was named."""
  if config.data.name == get_config().data.name:
    if pretrained.dataset:
      return DatasetInfo.from_json(pretrained.dataset)
    voc = DATASETS['voc2012']
    if pretrained.num_classes == voc.num_classes:
      return voc
  splits = (config.data.eval_split or config.data.train_split,)
  return build.open_dataset(config, *splits).info
