r"""PASCAL VOC 2012, ResNet-50: stage two of the paper, for the test server.

Chen et al. (2017), section 4: from the weights of stage one, with batch
normalization frozen, 30k steps at output stride 8 and learning rate 0.001 on
trainval. As it trains on val, it evaluates nothing: a score on val would be
worthless.

python -m deeplab_jax.main --config=voc_resnet50_stage2 \
  --config.init_from=STAGE1_WORKDIR --workdir=STAGE2_WORKDIR

Hardware, an estimate: one GPU with 80 GB, or two with 40 GB, six to twelve
hours (0.39 EFLOP).
Published, not ours: nothing for this network. Trained at output stride 8 on the
masks of SBD alone, ResNet-50 reaches val mIoU 76.2 to 77.7 (mmsegmentation).
"""

from deeplab_jax.configure import from_recipe


def get_config():
  config = from_recipe('voc_resnet50')
  # There is no such folder: a run without the option of the command stops.
  config.init_from = 'STAGE1_WORKDIR'
  config.model.output_stride = 8
  config.data.name = 'voc2012_segmentation/voc2012'
  config.data.train_split = 'trainval'
  config.data.eval_split = ''
  config.train.freeze_bn = True
  config.optimizer.learning_rate = 0.001
  return config
