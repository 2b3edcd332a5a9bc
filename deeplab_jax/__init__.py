"""DeepLab v3 for JAX."""

from deeplab_jax.models.deeplab import DeepLabV3, deeplab_v3
from deeplab_jax.models.resnet import BACKBONES, ResNetV2

__all__ = ['BACKBONES', 'DeepLabV3', 'ResNetV2', 'deeplab_v3']
