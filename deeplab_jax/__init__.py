"""DeepLab v3 for JAX."""

from deeplab_jax.models.deeplab import PRESETS, DeepLabV3, deeplab_v3
from deeplab_jax.models.resnet import BACKBONES, ResNetV2
from deeplab_jax.weights.load import load_pretrained

__version__ = '0.1.0'

__all__ = [
  'BACKBONES',
  'PRESETS',
  'DeepLabV3',
  'ResNetV2',
  'deeplab_v3',
  'load_pretrained',
]
