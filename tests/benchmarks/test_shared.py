"""One forward pass a batch for all methods that read logits or features, and the same bits as without sharing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

for module in ("pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')


from comparison import methods
from comparison.methods import own, shared, with_openood, with_pytorch_ood
from comparison.suite import Suite

from tests.helpers import tiny_suite

CPU = torch.device("cpu")
SHARING = (*with_openood.SHARED, "gsc", "prototype_fusion")


@pytest.fixture(params=["OpenOOD", "pytorch-ood"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose methods are run."""
    if request.param == "pytorch-ood":
        pytest.importorskip("pytorch_ood")
        monkeypatch.setattr(with_openood, "import_problem", lambda: "left out here")
    elif with_openood.import_problem():
        pytest.skip(str(with_openood.import_problem()))
    return str(request.param)


def scores(suite: Suite) -> dict[str, tuple[Tensor, Tensor]]:
    found, _ = methods.available(suite)
    assert set(SHARING) <= found.keys()
    result = {}
    for name in SHARING:
        scorer = found[name].build(suite, CPU, 7)
        parts = [scorer(batch) for images in suite.test_sets for batch, _ in images.loader(7)]
        result[name] = torch.cat([pred for pred, _ in parts]), torch.cat([score for _, score in parts])
    return result


class Unshared(nn.Module):
    """A network with the layers that Prototype Fusion takes of it."""

    names = "last_3"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forward = net.forward
        self.eval()


def test_shared_passes_change_no_bit(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tiny_suite.suite()
    found = scores(suite)
    for module in (own, with_openood, with_pytorch_ood):
        monkeypatch.setattr(module, "SharedNetwork", lambda net, x: net)
    monkeypatch.setattr(own, "SharedMeans", lambda net, *_: Unshared(net))
    for name, (pred, score) in scores(suite).items():
        assert torch.equal(found[name][0], pred), name
        assert torch.equal(found[name][1], score), name


def test_every_image_passes_once(library: str) -> None:
    suite = tiny_suite.suite()
    passed: Counter[int] = Counter()
    first = next(module for module in suite.network.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_hook(lambda _, given, __: passed.update([len(given[0])]))
    scores(suite)
    hook.remove()
    fitted = (suite.training, *(suite.validation or ())[:1])
    images = sum(len(some) for some in (*suite.test_sets, *fitted) if some)
    assert sum(size * count for size, count in passed.items() if size > 1) <= images


def test_what_a_method_writes_into_stays_its_own() -> None:
    suite = tiny_suite.suite()
    x = next(iter(suite.in_distribution.loader(5)))[0]
    network = shared.SharedNetwork(suite.network, x)
    assert network.head is not None
    network.head.register_forward_pre_hook(lambda _, given: given[0].zero_())
    found = shared.SharedPass.of(suite.network, x)(x)
    assert found.features is not None
    features, logits = found.features.clone(), found.logits.clone()
    with torch.no_grad():
        assert not torch.equal(network(x).zero_(), logits)
    assert torch.equal(found.features, features) and torch.equal(found.logits, logits)


def test_only_one_network_is_remembered_and_only_while_memory_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tiny_suite.suite(), tiny_suite.suite()
    x = next(iter(one.in_distribution.loader(5)))[0]
    first = shared.SharedPass.of(one.network, x)
    assert first(x) is first(x) and shared.SharedPass.of(one.network, x) is first
    with shared.nothing_shared():
        assert first(x) is not first(x)
    shared.SharedPass.of(other.network, x)
    assert first(x) is not first(x)
    monkeypatch.setattr(shared, "SHARE", 0)
    full = shared.SharedPass(one.network, x)
    assert full(x) is not full(x)


def test_a_network_without_a_linear_last_layer_shares_its_logits() -> None:
    network = nn.Sequential(tiny_suite.network(), nn.LogSoftmax(1)).eval()
    x = next(iter(tiny_suite.suite().in_distribution.loader(5)))[0]
    with torch.no_grad():
        assert torch.equal(shared.SharedNetwork(network, x)(x), network(x))


def test_what_the_pass_of_s_and_i_c_leaves_to_others_is_what_they_compute(library: str) -> None:
    suite, alone = tiny_suite.suite(), tiny_suite.suite()
    found, _ = methods.available(suite)
    assert [name for name, method in found.items() if method.first] == ["sandi_c"]
    first = found["sandi_c"].build(suite, CPU, 7)
    batches = [batch for images in suite.test_sets for batch, _ in images.loader(7)]
    for batch in batches:
        first(batch)
    passed: list[int] = []
    hook = suite.network.register_forward_hook(lambda _, given, __: passed.append(len(given[0])))
    others = {name: found[name].build(suite, CPU, 7) for name in SHARING}
    shared_scores = {name: [scorer(batch) for batch in batches] for name, scorer in others.items()}
    hook.remove()
    assert all(size == 1 for size in passed)
    single, _ = methods.available(alone)
    for name, kept in shared_scores.items():
        scorer = single[name].build(alone, CPU, 7)
        for batch, (pred, score) in zip(batches, kept, strict=True):
            expected = scorer(batch)
            assert torch.equal(pred, expected[0]) and torch.equal(score, expected[1]), name


def test_a_pass_of_other_images_is_not_kept() -> None:
    suite = tiny_suite.suite()
    x = next(iter(suite.in_distribution.loader(5)))[0]
    one = shared.SharedPass(suite.network, x)
    with torch.no_grad(), one.of_another_pass(x):
        suite.network(x[:1])
    assert torch.equal(one(x).logits, suite.network(x)) and len(one(x).logits) == 5
