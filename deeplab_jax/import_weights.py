"""Imports weights into a workdir, to evaluate, predict or train on."""

import copy
import functools
import logging
from pathlib import Path

import jax
import optax
from ml_collections import ConfigDict

from deeplab_jax import build
from deeplab_jax.config import from_json, get_config, to_json
from deeplab_jax.data.datasets import DATASETS, DatasetInfo
from deeplab_jax.models.deeplab import PRESETS
from deeplab_jax.runtime import distributed
from deeplab_jax.runtime.errors import UserError, naming
from deeplab_jax.training import steps
from deeplab_jax.training.writers import write_json
from deeplab_jax.weights import checkpoints
from deeplab_jax.weights.keras import PUBLISHED
from deeplab_jax.weights.load import (
  Pretrained,
  open_pretrained,
  own_checkpoint,
)

log = logging.getLogger(__name__)


def import_weights(config: ConfigDict, workdir: Path) -> None:
  """Writes a checkpoint of step 0 with the weights of `config.init_from`.

  It prints what was loaded, what keeps its initial value and what was not used.
  With `config.list` it prints where each array would go, and writes nothing.

  Raises:
    UserError: if the source cannot be read, does not fit the configuration, or
      the workdir is in use.
  """
  pretrained, config = open_source(config)
  if config.list:
    print(f'{pretrained.names}\npreset: {config.model.preset}')
    return
  if (workdir / 'checkpoints').is_dir():
    with checkpoints.Checkpoints(workdir) as saved:
      if saved.latest_step is not None:
        raise UserError(
          f'{workdir} has a checkpoint of step {saved.latest_step}; import into'
          ' another --workdir'
        )
  own = own_checkpoint(Path(config.init_from).expanduser())
  if own and (own[0] / 'config.json').exists() and _has_default_data(config):
    config.data.update(from_json(own[0] / 'config.json').data)
  info = _dataset_info(config, pretrained)
  model = build.make_model(config, info.num_classes)
  # Step 0 needs no state of an optimizer: training starts with a fresh one.
  state = steps.create_state(model, optax.identity(), config.seed)
  state = initialize(pretrained, state, config)
  with checkpoints.Checkpoints(workdir) as saved:
    saved.save(
      state, checkpoints.describe(to_json(config)['model'], info.to_json())
    )
  if distributed.is_first_process():
    write_json(workdir / 'config.json', to_json(config))
    print(f'{workdir} holds the weights for --mode=eval and --mode=predict')
    if _has_default_data(config):
      print('eval needs a data set of these classes: --config.data.*')


def _has_default_data(config: ConfigDict) -> bool:
  return config.data.to_dict() == get_config().data.to_dict()


def config_of(source: str, backbone: str) -> ConfigDict:
  """The default with the network that the weights of a source fix.

  The source 'keras' stands for several backbones and takes the one given, or
  ResNet-50 if it has no weights for that.
  """
  config = get_config()
  config.init_from, config.model.aspp_features = source, 256
  pretrained = _open(source, backbone if backbone in PUBLISHED else 'resnet50')
  config.model.update(pretrained.settings, preset=pretrained.presets[0])
  return config


def open_source(config: ConfigDict) -> tuple[Pretrained, ConfigDict]:
  """Reads `config.init_from`, and completes the settings of the model by it.

  Returns:
    The weights, and a copy of the configuration with their preset.

  Raises:
    UserError: if the source cannot be read or the configuration contradicts it.
  """
  config = copy.deepcopy(config)
  pretrained, model = (
    _open(config.init_from, config.model.backbone),
    config.model,
  )
  if pretrained.dataset:  # refused if void was trained as a class
    with naming(f'config.init_from={config.init_from}'):
      DatasetInfo.from_json(pretrained.dataset)
  model.preset = pretrained.preset_for(model.preset)
  wanted = {'bn_epsilon': PRESETS[model.preset]['bn_epsilon']}
  wanted |= pretrained.settings
  model.bn_epsilon = model.bn_epsilon or wanted['bn_epsilon']
  asked = to_json(config)['model']
  contradictions = [
    f'config.model.{key}={asked[key]} (there {value})'
    for key, value in wanted.items()
    if asked[key] != (list(value) if isinstance(value, tuple) else value)
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
  """Reads a source once, for its settings and for its arrays."""
  return open_pretrained(source, backbone=backbone)


def initialize(
  pretrained: Pretrained, state: steps.TrainState, config: ConfigDict
) -> steps.TrainState:
  """Puts the weights into a fresh state, and logs what was loaded."""
  variables, report = pretrained.merge_into(
    jax.device_get(state.variables), config.init_allow
  )
  _open.cache_clear()
  if distributed.is_first_process():
    preset = ' or '.join(pretrained.presets)
    log.info('weights of %s, preset %s\n%s', pretrained.source, preset, report)
  return state.replace(**variables)


def _dataset_info(config: ConfigDict, pretrained: Pretrained) -> DatasetInfo:
  """What the classes mean: by the source, unless a data set was named."""
  if config.data.name == get_config().data.name:
    if pretrained.dataset:
      return DatasetInfo.from_json(pretrained.dataset)
    voc = DATASETS['voc2012']
    if pretrained.num_classes == voc.num_classes:
      return voc
  split = config.data.eval_split or config.data.train_split
  return build.open_dataset(config, split).info
