"""The protocol that ``python main.py --postprocessor NAME`` runs when it is given no ``--config``.

OpenOOD's CIFAR-100 benchmark with its ``resnet18_32x32``: near-OOD CIFAR-10 and TinyImageNet, far-OOD MNIST,
SVHN, Textures and Places365.
"""

from __future__ import annotations

#: Files under the checkout's ``configs/``, as in OpenOOD's own ``scripts/ood/``.
CONFIGS = (
    "datasets/cifar100/cifar100.yml",
    "datasets/cifar100/cifar100_ood.yml",
    "networks/resnet18_32x32.yml",
    "pipelines/test/test_ood.yml",
    "preprocessors/base_preprocessor.yml",
)

#: Where OpenOOD's ``download.py`` puts the first of its three CIFAR-100 networks.
CHECKPOINT = "results/cifar100_resnet18_32x32_base_e100_lr0.1_default/s0/best.ckpt"
CHECKPOINT_DOWNLOAD = "cifar100_res18_v1.5"


def overrides() -> list[str]:
    """The protocol's ``--key value`` arguments: the checkpoint, no question on stdin, CPU where need be."""
    import torch

    gpus = [] if torch.cuda.device_count() else ["--num_gpus", "0"]
    return ["--network.checkpoint", CHECKPOINT, "--merge_option", "merge", *gpus]
