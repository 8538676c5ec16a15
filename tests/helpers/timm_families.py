"""timm's architectures, one small one a family: are S&I's default splits and gradients right there?

    python -m tests.helpers.timm_families [architecture ...]     # all by default; rewrites their rows of docs/timm.md

For each, S&I-Z and S&I-A choose their default split points and F on a randomly initialised network in float64. The
gradients g_1, g_2 at the first and a middle split (and at F, for A) must equal those of the naive reference
(``tests/helpers/naive_splits.py``), or the network is refused by an error that names the place and the remedy.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openood_sandi import ReplayError
from openood_sandi.detectors.sandi.losses import LogitsPlan, channel_average_plan
from openood_sandi.detectors.sandi.variants import VariantChoice
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.network import SplitNetwork
from openood_sandi.engine.recorded import Site
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.walk import Observer, Walk
from tests.helpers.naive_splits import Naive, difference
from tests.helpers.oracle import Options
from tests.helpers.places import ROOT

TABLE = ROOT / "docs/timm.md"
RELATIVE = 1e-9
SECONDS = 120
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 384)


def _names(text: str) -> list[str]:
    return text.split()


#: These take seconds each; tests run them.
QUICK = _names("""
test_vit test_vit2 test_vit3 test_vit_relpos test_convnext test_convnext2 test_efficientnet test_efficientnet_gn
test_efficientnet_ln test_efficientnet_evos test_resnet test_nfnet test_byobnet test_mambaout test_coatnet test_maxvit
resnet10t resnet18 resnet34d resnetv2_18 resnetaa34d seresnet18 skresnet18 legacy_seresnet18 dla46_c regnetx_002
regnety_002 repvgg_a0 gernet_s mobileone_s0 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035
tf_mobilenetv3_small_minimal_100 lcnet_035 lcnetv2_small mnasnet_small semnasnet_050 mobilenetv1_100 ghostnet_050
ghostnetv2_100 repghostnet_050 starnet_s050 fasternet_t0 shvit_s1 efficientvit_m0 efficientvit_b0 cpubone_nano
selecsls42 hardcorenas_a ese_vovnet19b_slim_dw hgnetv2_b0 convnext_zepto_rms convnext_atto convnextv2_atto
inception_next_atto edgenext_xx_small mobilevit_xxs mobilevitv2_050 swiftformer_xs pit_ti_224 pvt_v2_b0 levit_128s
levit_conv_128s tiny_vit_5m_224 repvit_m0_9 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 resmlp_12_224
gmlp_ti16_224 convit_tiny xcit_nano_12_p16_224
""")

OTHERS = _names("""
efficientformer_l1 efficientformerv2_s0 visformer_tiny fastvit_t8 ghostnetv3_050 vit_tiny_patch16_224
vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384
vit_small_patch16_dinov3 vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_224 cait_xxs24_224 coat_tiny
coat_lite_tiny crossvit_tiny_240 convmixer_768_32 csatv2 cspresnet50 cspdarknet53 darknet17 cs3darknet_focus_s
cspnext_tiny davit_tiny deit3_small_patch16_224 densenet121 densenetblur121d dpn48b dpn68b efficientvim_m1
focalnet_tiny_srf gcvit_xxtiny hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_v3 lowformer_b0
botnet26t_256 eca_halonext26ts lambda_resnet26t bat_resnext26ts gcresnext26ts resnext26ts caformer_s18 convformer_s18
poolformer_s12 poolformerv2_s12 mixer_s32_224 gmixer_12_224 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap
nest_tiny nextvit_small eca_nfnet_l0 nf_resnet26 nf_regnet_b0 rdnet_tiny res2net50_14w_8s resnest14d resnet50_gn
resnetblur18 ecaresnet26t resnext50_32x4d resnetrs50 resnetv2_50x1_bit resnetv2_50d_frn resnetv2_50d_evos rexnet_100
sequencer2d_s regnetz_005 regnetz_b16 regnetv_040 swin_tiny_patch4_window7_224 swin_s3_tiny_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 tnt_s_patch16_224 twins_pcpvt_small twins_svt_small
vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a legacy_xception xception41 xception41p mixnet_s
efficientnet_b0 efficientnetv2_rw_t efficientnet_lite0 efficientnet_cc_b0_4e fbnetc_100 spnasnet_100
tf_efficientnet_es maxxvit_rmlp_nano_rw_256 coatnet_pico_rw_224 vgg11 vgg11_bn beit_base_patch16_224 inception_v4
inception_resnet_v2 samvit_base_patch16_224 dm_nfnet_f0 tresnet_m mobilenetv5_base qwen3_vit_88m gemma4_vit_167m
deepseek_vit_412m nasnetalarge pnasnet5large
""")

ALL = [*QUICK, *OTHERS]


# ---------------------------------------------------------------------------------------- networks


def build(name: str, classes: int = 10) -> tuple[nn.Module, Tensor]:
    """The architecture with noise on all weights, in float64, and two images of the smallest size that it takes."""
    import timm

    torch.manual_seed(0)
    for options in (("img_size",), ()):
        for size in SIZES:
            try:
                net = timm.create_model(name, num_classes=classes, **dict.fromkeys(options, size))
                x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                return _randomised(net, x), x
            except TypeError:  # it takes no img_size
                break
            except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
                continue
    raise RuntimeError(f"{name} takes images of none of the sizes {SIZES}")


@torch.no_grad()
def _randomised(net: nn.Module, x: Tensor) -> nn.Module:
    """Untrained networks are degenerate: last norms and layer scales of zero cut off whole branches."""
    net = net.eval().double().requires_grad_(False)
    net(x)  # before time is spent on it
    for parameter in net.parameters():
        spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
        parameter.add_(torch.randn_like(parameter), alpha=0.1 * (spread or 1.0))
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:  # the statistics of this batch, so that activations stay of order one
        norm.train()
        norm.momentum = 0.9
    if norms:
        net(torch.cat([x, x.flip(-1)]))
    logits = net.eval()(x)
    if not logits.isfinite().all() or not logits.std() > 0:
        raise RuntimeError("its logits are not finite, or all the same")
    return net


# ---------------------------------------------------------------------------------------- one architecture


@dataclass(frozen=True)
class Outcome:
    """What came of one variant on one architecture."""

    splits: str
    feature: str
    result: str

    @property
    def right(self) -> bool:
        return self.result.startswith(("equal", "refused"))


class _Kept(Observer):
    def __init__(self) -> None:
        self.found: dict[Site, list[Tensor]] = {}

    def gradient(self, site: Site, gradient: Tensor) -> None:
        self.found.setdefault(site, []).append(gradient.clone())


def examine(net: nn.Module, x: Tensor, variant: str) -> Outcome:
    """The default splits of ``variant``, and whether the gradients at two of them are those of the reference."""
    try:
        network, feature = _split(net, x, variant)
        splits = network.splits
        two = [splits[0], splits[len(splits) // 2]][: len(splits)]
        found = _gradients(network, x, two, feature)
    except (ReplayError, ValueError, TypeError) as error:
        return Outcome("", "", f"refused: {error}")
    result = _compared(net, x, two, feature, found)
    if network.is_plain and result == "equal":
        result = "equal, by whole passes"
    names = f"{len(splits)}: {splits[0].name} to {splits[-1].name}"
    return Outcome(names, feature.name if feature else "", result)


def chosen(net: nn.Module, x: Tensor, variant: str) -> tuple[tuple[Split, ...], Split | None]:
    """The default splits of ``variant``, and F for A."""
    network, feature = _split(net, x, variant)
    return network.splits, feature


def _split(net: nn.Module, x: Tensor, variant: str) -> tuple[SplitNetwork, Split | None]:
    choice = VariantChoice(variant, "auto", "auto")
    network = SplitNetwork(net, splits=choice)
    network.over(x, lambda part: None, list)
    return network, choice.feature


def _gradients(
    network: SplitNetwork, x: Tensor, splits: Sequence[Split], feature: Split | None
) -> dict[Site, list[Tensor]]:
    """g_1, g_2 of the package."""
    options, kept = Options(), _Kept()
    attack = Attack(options.steps, options.step_size, options.epsilon)
    if feature is None:
        walk = Walk(LogitsPlan(splits, options.attribution, options.ascent), attack)
    else:
        plan = channel_average_plan(splits, feature, options.ascent, options.top_fraction, options.top_over)
        walk = Walk(plan, attack, feature.site)
    wanted = splits if feature is None else [*splits, feature]
    network.over(x, lambda part: network.walk(part, walk, kept, wanted), list)
    return kept.found


def _compared(
    net: nn.Module, x: Tensor, splits: Sequence[Split], feature: Split | None, found: dict[Site, list[Tensor]]
) -> str:
    naive = Naive(net, x, feature)
    expected = {split: naive.gradients(split) for split in splits}
    if feature is not None:
        expected[feature] = naive.output_gradients()
    far = {split.name: difference(found.get(split.site, []), gs) for split, gs in expected.items()}
    worst = max(far, key=far.__getitem__)
    if far[worst] > RELATIVE:
        return f"differs by {far[worst]:.1e} at {worst}"
    none = [split.name for split, gs in expected.items() if not any(g.any() for g in gs)]
    return f"no gradient at {none[0]}" if none else "equal"


# ---------------------------------------------------------------------------------------- the table


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where it takes longer; main thread only."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row(name: str, seconds: int = SECONDS) -> str:
    """One line of the table."""
    size, outcomes = 0, []
    try:
        with limited(seconds):
            net, x = build(name)
            size = x.shape[-1]
            outcomes = [examine(net, x, "Z")]
            outcomes.append(examine(net, x, "A"))
    except Exception as error:  # whatever it is, the other architectures are examined
        outcomes += [Outcome("", "", f"failed: {type(error).__name__}: {error}")] * (2 - len(outcomes))
    z, a = outcomes
    cells = (name, size or "", z.splits, a.splits, a.feature, z.result, a.result)
    return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"


def rows_in(text: str) -> dict[str, str]:
    """{architecture: its line} of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| Architecture")]
    return {line.split("|")[1].strip(): line for line in lines}


def right(line: str) -> bool:
    """Whether both variants are, in a line of the table."""
    return all(cell.strip().startswith(("equal", "refused")) for cell in line.split(" | ")[-2:])


def document(rows: Iterable[str]) -> str:
    import timm

    rows = list(rows)
    refused = sum("| refused" in line for line in rows)
    whole = sum("by whole passes" in line for line in rows)
    head = f"""# timm's architectures

S&I on one small architecture of each of timm's families, with random weights, in float64, at the smallest size of
images that the network takes: the split points that `splits="auto"` and F that `feature="auto"` choose for Z and A,
and whether the gradients g_1 and g_2 at the first and at a middle split point, and at F, equal those of a naive
reference (whole passes, one split point at a time) to {RELATIVE:g} of the largest. "Refused" is an error that says
where and what to do instead.

{len(rows)} of the {len(ALL)} architectures listed have been run, and {sum(map(right, rows))} of them are right; of
these {refused} are refused in a variant or both, and {whole} computed by whole passes. The others failed as the table
says; where that is the time limit, no difference was found before it. torch {torch.__version__},
timm {timm.__version__}; written by `python -m tests.helpers.timm_families`.

| Architecture | Size | Z splits | A splits | F | Z | A |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=ALL)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time limit of each")
    parser.add_argument("--table", type=type(TABLE), default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.architectures:
        start = time.perf_counter()
        line = row(name, options.seconds)
        print(f"{time.perf_counter() - start:6.1f} s {line}", flush=True)
        rows = rows_in(options.table.read_text() if options.table.exists() else "")
        rows[name] = line
        known = [architecture for architecture in ALL if architecture in rows]
        options.table.write_text(document(rows[architecture] for architecture in known))


if __name__ == "__main__":
    main()
