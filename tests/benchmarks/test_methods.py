"""The comparison's methods where OpenOOD is absent: what is offered, why the rest is not, and what is computed."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

for module in ("pandas", "sklearn", "tqdm", "pytorch_ood"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison import methods
from comparison.methods import own, with_openood
from comparison.methods.baselines import BASELINES
from comparison.methods.network import Blocks, NetworkParts, OpenOODNetwork
from comparison.suite import Suite

from openood_sandi import GradientShortCircuit, PrototypeFusion
from tests.helpers import networks, tiny_suite
from tests.helpers.surroundings import surroundings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_openood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_openood, "import_problem", lambda: "OpenOOD does not import")


def images(suite: Suite) -> Tensor:
    return next(iter(suite.in_distribution.loader(100)))[0]


# --- what is offered ------------------------------------------------------------------------------------------------


def test_without_openood_the_same_names_come_from_pytorch_ood() -> None:
    found, absent = methods.available(tiny_suite.suite())
    assert list(found)[: len(methods.DEFAULT)] == list(methods.DEFAULT)
    assert {found[name].source for name in BASELINES} == {"pytorch-ood"}
    assert {found[name].source for name in found if name not in BASELINES} == {"openood-sandi"}
    searches = {name for name in absent if name.endswith("-search")}
    assert {"sandi-search", "gsc-search", "gen-search"} <= searches
    assert {absent[name] for name in searches} == {"OpenOOD does not import"}
    assert found["vim"].options["dim"] == 16  # half the features, where OpenOOD's 256 are too many
    for name, detector in (("gsc", GradientShortCircuit), ("prototype_fusion", PrototypeFusion)):
        defaults = inspect.unwrap(detector.__init__).__kwdefaults__
        assert defaults.items() <= found[name].options.items()


def test_what_lacks_images_is_not_offered() -> None:
    found, absent = methods.available(tiny_suite.suite(training=None, validation=None))
    wants_training = {"knn", "vim", "fdbd", "nci", "prototype_fusion", "sandi_c"}
    assert {name for name, reason in absent.items() if "needs training images" in reason} == wants_training
    assert {name for name, reason in absent.items() if "needs validation images" in reason} == {"react"}
    assert not found.keys() & {*wants_training, "react"}
    few = tiny_suite.suite(training=tiny_suite.image_set("training", "ID", 49, 2, 4))
    assert "needs 50 training images, tiny has 49 here" in methods.available(few)[1]["knn"]


def test_what_lacks_a_linear_last_layer_is_not_offered() -> None:
    network = nn.Sequential(tiny_suite.network(), nn.LogSoftmax(1)).eval()
    found, absent = methods.available(tiny_suite.suite(network=network))
    assert {name for name, reason in absent.items() if "linear layer" in reason} == {
        *("gradnorm", "react", "rankfeat", "scale", "ash", "knn", "vim", "fdbd", "nci", "gsc")
    }
    assert {"msp", "odin", "ebo", "mls", "gen", "prototype_fusion", "sandi-z"} <= found.keys()


def test_what_decides_the_scores_is_in_the_options() -> None:
    suite = tiny_suite.suite()
    known, unknown = tiny_suite.image_set("val", "ID", 9, 3, 4), tiny_suite.image_set("val-ood", "near", 9, 4, 7)
    training = tiny_suite.image_set("training", "ID", 120, 2, 4)
    changed = replace(suite, training=training, validation=(known, unknown))
    before, after = (methods.available(given)[0] for given in (suite, changed))
    differing = {name for name in before if before[name].options != after[name].options}
    assert differing == {"knn", "vim", "fdbd", "nci", "prototype_fusion", "sandi_c", "react"}


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_scores_and_leaves_everything_as_found() -> None:
    suite = tiny_suite.suite(paper_splits=("stage3.bn2",), paper_feature="stage3")
    suite.network.requires_grad_(True)
    x = images(suite)
    before = surroundings(suite.network, x)
    found, _ = methods.available(suite)
    assert {"sandi-z-paper", "sandi-a-paper"} <= found.keys()
    for name, method in found.items():
        scorer = method.build(suite, CPU, 50)
        pred, score = scorer(x)
        assert torch.equal(pred, suite.network(x).argmax(1)), name
        assert score.shape == (12,) and score.isfinite().all() and not score.requires_grad, name
        torch.testing.assert_close(scorer(x)[1], score, rtol=0, atol=0, msg=name)
        assert surroundings(suite.network, x) == before, name


def test_settings_of_this_package_mean_what_they_say() -> None:
    suite = tiny_suite.suite()
    x = images(suite)
    found, _ = methods.available(suite)
    scores = {name: found[name].build(suite, CPU, 50)(x)[1] for name in ("gaia-z", *own.SETTINGS)}
    same = {  # facts about the method
        **dict.fromkeys(("sandi-z-no-attack", "sandi-z-union", "sandi-z-neither"), "gaia-z"),
        "sandi-a-neither": "sandi-a-no-attack",
    }
    for name, other in same.items():
        assert torch.equal(scores[name], scores[other]), name
    differing = [scores[name] for name in own.SETTINGS if name not in same]
    pairs = [(a, b) for i, a in enumerate(differing) for b in differing[:i]]
    # small steps may leave the pattern of non-zero gradients as it is
    assert sum(torch.equal(a, b) for a, b in pairs) <= 3


def test_rankfeat_from_its_definition() -> None:
    suite = tiny_suite.suite()
    net, x = suite.network, images(suite)
    with torch.no_grad():
        maps = net.stage3(net.stage2(net.stage1(x)))
        matrix = maps.flatten(2)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rest = matrix - s[:, :1, None] * u[:, :, :1] * v[:, :1]
        expected = -net.head(rest.mean(2)).logsumexp(1)
    score = methods.available(suite)[0]["rankfeat"].build(suite, CPU, 50)(x)[1]
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


# --- networks taken apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("resnext", ("layer3", "layer4")),
        ("mobilenet_v2", ("features.13", "features")),
        ("torchvision_densenet", None),  # a rectifier stands between the last map and its mean
        ("vit_b_16", None),
        ("alexnet", None),
    ],
)
def test_blocks_of_known_networks(name: str, pieces: tuple[str, str] | None) -> None:
    cases = {case.name: (case.make, case.size) for case in networks.TORCHVISION + networks.OPENOOD}
    cases["mobilenet_v2"] = (
        lambda: networks.torchvision_models().mobilenet_v2(weights=None, width_mult=0.25),
        64,
    )
    cases["resnext"] = (cases["resnext"][0], 64)
    make, size = cases[name]
    net = make().eval()
    for parameter in net.parameters():  # some come without values
        nn.init.normal_(parameter, 0, 0.1)
    x = torch.randn(2, 3, size, size)
    if pieces is None:
        with pytest.raises(ValueError, match="needs "):
            Blocks(net, x)
        return
    blocks = Blocks(net, x)
    assert (blocks.before, blocks.after) == pieces
    adapted = OpenOODNetwork(net, x)
    with torch.no_grad():
        before, after = (adapted.intermediate_forward(x, index) for index in (3, 4))
        torch.testing.assert_close(adapted.layer4(before), after)
        logits = adapted.fc(torch.flatten(adapted.avgpool(after), 1))
        torch.testing.assert_close(logits, net(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted(x, return_feature=True)[1], after.mean((2, 3)))


def test_a_last_layer_without_bias_gets_one_of_zeros() -> None:
    net = copy.deepcopy(tiny_suite.network())
    net.head.bias = None
    suite = tiny_suite.suite(network=net)
    adapted = OpenOODNetwork(net, images(suite))
    weight, bias = adapted.get_fc()
    assert not bias.any() and (weight == net.head.weight.detach().numpy()).all()
    head = NetworkParts(suite).head
    assert head is not None and head.weight.shape[1] == 32
    for name in ("react", "vim", "fdbd"):
        assert methods.available(suite)[0][name].build(suite, CPU, 50)(images(suite))[1].isfinite().all()
