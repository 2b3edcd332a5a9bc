r"""PASCAL VOC 2012 with the masks of SBD, ResNet-50: stage one of the paper.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation"
(2017), section 4: crop 513, batch 16, 30k steps at output stride 16, learning
rate 0.007 with power 0.9, from ImageNet weights (here those of Keras). Images,
masks and weights are downloaded.

python -m deeplab_jax.main --config=voc_resnet50 --workdir=STAGE1_WORKDIR

Hardware, an estimate: one A100 with 40 GB, two to four hours (0.12 EFLOP).
Published, not ours: val mIoU 76.9 (ResNet-50 at output stride 16 by
sssegmentation and, on center crops, VainF).
"""

from deeplab_jax import config as default


def get_config():
  config = default.get_config()
  config.init_from = 'keras'
  config.model.backbone = 'resnet50'
  config.model.width = 1.0
  config.model.output_stride = 16
  config.model.aspp_features = 256
  config.model.bn_decay = 0.9997

  config.data.name = 'voc2012_segmentation/trainaug'
  config.data.crop_size = (513, 513)

  config.train.batch_size = 16
  config.train.steps = 30_000
  config.train.eval_every = 2000
  config.train.log_every = 50

  config.optimizer.learning_rate = 0.007
  return config
