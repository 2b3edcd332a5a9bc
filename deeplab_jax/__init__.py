"""DeepLab v3 for JAX."""

from typing import Any

from deeplab_jax.models.deeplab import (
  PRESETS,
  DeepLabV3,
  deeplab_v3,
  deeplab_v3plus,
)
from deeplab_jax.models.resnet import BACKBONES, ResNetV1, ResNetV2
from deeplab_jax.weights.load import load_pretrained

__version__ = '0.1.0'

__all__ = [
  'BACKBONES',
  'PRESETS',
  'DeepLabV3',
  'Predictor',
  'ResNetV1',
  'ResNetV2',
  'deeplab_v3',
  'deeplab_v3plus',
  'load_pretrained',
]


def __getattr__(name: str) -> Any:
  """Loads `Predictor`, and the data formats it needs, when it is asked for."""
  if name == 'Predictor':
    from deeplab_jax.predict import Predictor

    return Predictor
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
