r"""PASCAL VOC 2012, ResNet-50, output stride 16: the paper's schedule.

python -m deeplab_jax.main --config=experiments/voc_resnet50.py \
  --config.data.dir=VOCdevkit/VOC2012 --workdir=WORKDIR

The folder needs a classes.txt with the 21 class names, one a line. Chen et al.,
"Rethinking Atrous Convolution for Semantic Image Segmentation" (2017), section
4: crop 513, batch 16, 30k steps, learning rate 0.007 with power 0.9. The paper
starts from ImageNet weights. Not run by us yet.
"""

from deeplab_jax import config as default


def get_config():
  config = default.get_config()
  config.model.backbone = 'resnet50'
  config.model.width = 1.0
  config.model.output_stride = 16
  config.model.aspp_features = 256
  config.model.bn_decay = 0.9997

  config.data.name = 'folder'
  config.data.crop_size = (513, 513)
  config.data.threads = 16

  config.train.batch_size = 16
  config.train.steps = 30_000
  config.train.eval_every = 2000
  config.train.log_every = 50

  config.optimizer.learning_rate = 0.007
  config.optimizer.weight_decay = 1e-4
  config.optimizer.warmup_steps = 0
  return config
