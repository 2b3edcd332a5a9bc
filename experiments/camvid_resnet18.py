r"""CamVid, ResNet-18 of half width from scratch: half an hour on two cores.

CAMVID is the SegNet split (367 train, 101 val, 11 classes) in VOC layout.

python -m deeplab_jax.main --config=camvid_resnet18 \
  --config.data.dir=CAMVID --workdir=WORKDIR

Result: val mIoU 61.5, pixel accuracy 89.9, the means of three seeds. See
RESULTS.md.
"""

from deeplab_jax import config as default


def get_config():
  config = default.get_config()
  config.model.width = 0.5
  config.model.output_stride = 16
  config.model.decoder = 'v3plus'
  config.model.bn_decay = 0.95

  config.data.name = 'folder'
  config.data.scale = (0.75, 1.5)
  config.data.crop_size = (241, 321)

  config.train.steps = 3000
  config.train.eval_every = 500
  config.train.log_every = 10

  config.loss.class_weights = ('sqrt_median_frequency',)

  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 0.003
  config.optimizer.weight_decay = 1e-5
  config.optimizer.warmup_steps = 30

  config.eval.batch_size = 4
  return config
