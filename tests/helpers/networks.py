"""The networks that the engine is tested on: OpenOOD's, torchvision's and hand-made traps, all of them small."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.helpers.cases import Case
from tests.helpers.rectifier_traps import RECTIFIER_TRAPS
from tests.helpers.trap_networks import TRAPS, Plain

# --- torchvision ----------------------------------------------------------------------------------------------------


def torchvision_models() -> ModuleType:
    return pytest.importorskip("torchvision.models", reason="needs torchvision: pip install torchvision")


def torchvision(name: str, size: int, feature: str, splits: tuple[str, ...] = (), **options: object) -> Case:
    def make() -> nn.Module:
        return getattr(torchvision_models(), name)(weights=None, num_classes=11, **options)

    return Case(name, make, size, feature, splits, at_most=4)


def small_efficientnet() -> nn.Module:
    module = torchvision_models().efficientnet
    plan = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 1), (4, 5, 2, 16, 16, 2)]
    return module.EfficientNet([module.MBConvConfig(*block) for block in plan], dropout=0.2, num_classes=11)


def small_vgg() -> nn.Module:
    vgg = torchvision_models().vgg
    with torch.device("meta"):  # its classifier is fixed, and of a hundred million weights
        net = vgg.VGG(vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True), init_weights=False)
    net.classifier = nn.Sequential(nn.Dropout(), nn.Linear(16 * 7 * 7, 16), nn.ReLU(True), nn.Linear(16, 11))
    return net.to_empty(device="cpu")


def small_alexnet() -> nn.Module:
    with torch.device("meta"):
        net = torchvision_models().alexnet(weights=None)
    net.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 6 * 6, 16), nn.ReLU(True), nn.Linear(16, 11))
    return net.to_empty(device="cpu")


def small_resnext() -> nn.Module:
    resnet = torchvision_models().resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=11)


def small_convnext() -> nn.Module:
    convnext = torchvision_models().convnext
    stages = [(16, 32, 1), (32, 48, 2), (48, None, 1)]
    return convnext.ConvNeXt([convnext.CNBlockConfig(*stage) for stage in stages], num_classes=11)


def small_swin_v2() -> nn.Module:
    swin = torchvision_models().swin_transformer
    return swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=[4, 4],
        num_classes=11,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )


def small_densenet() -> nn.Module:
    return torchvision_models().DenseNet(growth_rate=8, block_config=(3, 3), num_init_features=16, num_classes=11)


def small_maxvit() -> nn.Module:
    return torchvision_models().MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.1,
        num_classes=11,
    )


TORCHVISION = [
    torchvision("mobilenet_v3_small", 40, "features", width_mult=0.25),
    Case("efficientnet", small_efficientnet, 32, "features", at_most=4),
    torchvision("shufflenet_v2_x0_5", 64, "conv5"),
    torchvision("squeezenet1_1", 48, "features", splits=("features.0", "features.3", "features.9.expand3x3")),
    torchvision(
        "googlenet",
        48,
        "inception5b",
        ("inception4e.branch2.1.bn", "inception5a.branch3.1.bn", "inception5b.branch4.1.bn"),
        init_weights=False,
        aux_logits=True,
    ),
    Case("convnext", small_convnext, 32, "features", at_most=4),
    Case("maxvit", small_maxvit, 32, "blocks.1"),
    Case("mnasnet", lambda: torchvision_models().MNASNet(0.1, num_classes=11), 40, "layers", at_most=4),
    Case("vgg_bn", small_vgg, 32, "features"),
    Case("alexnet", small_alexnet, 64, "features", ("features.0", "features.6", "features.8")),
    torchvision(
        "inception_v3",
        75,
        "Mixed_7c",
        ("Mixed_6e.branch_pool.bn", "Mixed_7b.branch3x3dbl_3a.bn", "Mixed_7c.branch1x1.bn"),
        init_weights=False,
        aux_logits=True,
    ),
    Case("torchvision_densenet", small_densenet, 32, "features.denseblock2", at_most=4),
    Case("resnext", small_resnext, 32, "layer4", at_most=4),
    Case("swin_v2", small_swin_v2, 32, "permute"),
]


# --- OpenOOD --------------------------------------------------------------------------------------------------------


def openood_network(module: str) -> ModuleType:
    """A file of OpenOOD's ``openood/networks``, from $OPENOOD_HOME or an installed OpenOOD.

    Loaded by its path: the package around it imports far more than these files need.
    """
    if "OPENOOD_HOME" in os.environ:
        roots = [Path(os.environ["OPENOOD_HOME"]) / "openood"]
    else:
        package = importlib.util.find_spec("openood")
        roots = [Path(root) for root in (package and package.submodule_search_locations) or ()]
    for root in roots:
        file = root / "networks" / f"{module}.py"
        if file.is_file():
            name = f"_openood_networks_{module}"
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[name] = loaded  # copies and pickles look classes up by module
            spec.loader.exec_module(loaded)
            return loaded
    pytest.skip("needs OpenOOD: git clone https://github.com/Jingkang50/OpenOOD DIR && OPENOOD_HOME=DIR pytest")


def small_regnet() -> nn.Module:
    """OpenOOD's class has no arguments; its forward on torchvision's body of a small plan."""
    ours = openood_network("regnet_y_16gf").RegNet_Y_16GF
    from torchvision.models.regnet import BlockParams, RegNet

    plan = BlockParams.from_init_params(depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25)
    net = RegNet(plan, num_classes=11)
    net.__class__ = ours
    return net


def small_resnet18() -> nn.Module:
    module = openood_network("resnet18_32x32")
    return module.ResNet18_32x32(module.BasicBlock, [1, 1, 1, 1], num_classes=11)


OPENOOD = [
    Case("resnet18_32x32", small_resnet18, 32, "layer4"),
    Case(
        "resnet18_224x224",
        lambda: openood_network("resnet18_224x224").ResNet18_224x224(layers=[1, 1, 1, 1], num_classes=11),
        64,
        "layer4",
    ),
    Case(
        "resnet50",
        lambda: openood_network("resnet50").ResNet50(layers=[1, 1, 1, 1], num_classes=11),
        64,
        "layer4",
        at_most=4,
    ),
    Case("wrn", lambda: openood_network("wrn").WideResNet(10, 11, widen_factor=1), 32, "relu"),
    Case("densenet", lambda: openood_network("densenet").DenseNet3(22, growth_rate=4, num_classes=11), 32, "relu"),
    Case(
        "bit",
        lambda: openood_network("bit").ResNetV2([1, 1, 1, 1], 1, head_size=11),
        32,
        "before_head",
        splits=("body.block2.unit01.gn3", "body.block4.unit01.gn1", "body.block4.unit01.gn2", "before_head.gn"),
    ),
    Case(
        "vit_b_16",
        lambda: openood_network("vit_b_16").ViT_B_16(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=11
        ),
        32,
        "encoder.layers.encoder_layer_1",
        splits=(
            "encoder.layers.encoder_layer_0.ln_1",
            "encoder.layers.encoder_layer_0.ln_2",
            "encoder.layers.encoder_layer_1.ln_2",
        ),
    ),
    Case(
        "swin_t",
        lambda: openood_network("swin_t").Swin_T(
            embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=[3, 3], num_classes=11
        ),
        32,
        "permute",
    ),
    Case("regnet_y_16gf", small_regnet, 32, "trunk_output"),
    Case("lenet", lambda: openood_network("lenet").LeNet(11), 28, "block2", splits=("block1.0", "block2.0")),
]


# --- traps ----------------------------------------------------------------------------------------------------------

OWN_SPLITS = {
    "Functional": ("stem", "conv1", "act", "last"),
    # Its stem computes without gradients: autograd itself has nothing to say about "norm0".
    "FrozenStem": ("norm1", "norm9"),
    "Dropouts": ("norm0", "drop1", "norm1", "drop2", "same", "norm9"),
    "Pooled": ("norm0", "norm1", "pool", "norm2", "act", "norm9"),
    "RectifiedBehindItsBack": ("norm0", "norm1", "relu", "norm9"),
    "InPlaceResidual": ("norm0", "norm1", "relu", "norm2", "relu#2", "norm9"),
    "Reused": ("norm0", "norm1", "norm1#2", "norm1#3", "conv1#3", "norm9"),
}

HANDMADE = [
    Case(name, make, 16, "feature", OWN_SPLITS.get(name, ()), at_most=12)
    for name, make in (TRAPS | RECTIFIER_TRAPS).items()
]
HANDMADE += [Case("Plain", Plain, 16, "relu2", ("conv1", "conv2"))]

ALL = [*HANDMADE, *OPENOOD, *TORCHVISION]

#: Those that take seconds against a reference, and of these the ones whose kind another is of.
SLOW = {
    *("alexnet", "bit", "convnext", "efficientnet", "googlenet", "maxvit", "mobilenet_v3_small", "regnet_y_16gf"),
    *("resnet18_32x32", "resnet50", "shufflenet_v2_x0_5", "swin_t"),
}
LONG = {"inception_v3", "mnasnet", "resnet18_224x224", "resnext", "swin_v2"}


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """Of a test that compares the network with a reference."""
    return [pytest.mark.slow] * (case.name in SLOW) + [pytest.mark.long] * (case.name in LONG)


#: Each network, for a test's parameter ``case``.
each = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=marks(case)) for case in ALL],
    scope="module",
)
