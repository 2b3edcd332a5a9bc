r"""PASCAL VOC 2012 with the masks of SBD, ResNet-101: stage one of the paper.

This is voc_resnet50 with another backbone. Stage two is voc_resnet50_stage2
with --config.model.backbone=resnet101.

python -m deeplab_jax.main --config=voc_resnet101 --workdir=STAGE1_WORKDIR

Hardware, an estimate: one A100 with 40 GB, three to six hours (0.18 EFLOP).
Published, not ours: val mIoU 77.21; evaluated at output stride 8 78.51, at six
scales too 79.45, and mirrored as well 79.77 (the paper).
"""

from deeplab_jax.configure import from_recipe


def get_config():
  config = from_recipe('voc_resnet50')
  config.model.backbone = 'resnet101'
  return config
