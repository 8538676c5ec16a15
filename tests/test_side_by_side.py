"""The embedded benchmark: its images, network, metrics, timing and command."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

for module in ("matplotlib", "pandas", "sklearn", "tqdm"):
    pytest.importorskip(module, reason=f'{module} is missing; supply it by pip install -e ".[bench]"')

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pandas as pd  # noqa: E402
import side_by_side  # noqa: E402
from comparison import cost, digit_images, digits, methods, training  # noqa: E402
from comparison.metrics import detection  # noqa: E402
from comparison.small_resnet import SmallResNet  # noqa: E402

QUICK = training.Recipe(widths=(4, 4, 8), blocks=1, epochs=1)
OOD_SETS: dict[str, Callable[..., digit_images.Images]] = {
    "letters": digit_images.letters,
    "photos": digit_images.photo_patches,
    "noise": digit_images.noise,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share, and threads that wait for a busy processor cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- metrics


def test_metrics_of_a_hand_worked_example() -> None:
    # Of 20 ID images two score above every OOD image; of 20 OOD images one scores below every ID image.
    id_scores = np.array([1.0] * 18 + [20.0] * 2)
    ood_scores = np.array([10.0] * 19 + [0.5])
    result = detection(id_scores, ood_scores)
    # Catching 19 OOD images (score >= 10) loses the two ID images at 20.
    assert result.fpr95_id_lost == pytest.approx(2 / 20)
    # Keeping 19 ID images means keeping those at 20 too, and with them every OOD image.
    assert result.fpr95_ood_let_in == pytest.approx(20 / 20)
    # 19 x 18 of the 20 x 20 pairs are in order.
    assert result.auroc == pytest.approx(19 * 18 / 400)
    # Trapezoids between (recall, precision): (1, 20/40), (19/20, 19/39), (19/20, 19/21), (0, 0).
    assert result.aupr_out == pytest.approx(0.05 * (20 / 40 + 19 / 39) / 2 + 0.95 * (19 / 21) / 2)
    # (1, 20/40), (18/20, 18/38), (18/20, 18/19), (0, 0).
    assert result.aupr_in == pytest.approx(0.1 * (20 / 40 + 18 / 38) / 2 + 0.9 * (18 / 19) / 2)


def test_metrics_of_perfect_and_of_useless_scores() -> None:
    perfect = detection(np.arange(5.0), np.arange(5.0) + 5)
    assert (perfect.auroc, perfect.fpr95_id_lost, perfect.fpr95_ood_let_in) == (1, 0, 0)
    useless = detection(np.zeros(5), np.zeros(5))
    assert (useless.auroc, useless.fpr95_id_lost, useless.fpr95_ood_let_in) == (0.5, 1, 1)


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=60, unique=True).flatmap(
        lambda scores: st.tuples(st.just(scores), st.integers(1, len(scores) - 1))
    )
)
def test_fpr95_is_what_its_names_say(case: tuple[list[int], int]) -> None:
    scores, split = case
    id_scores, ood_scores = np.array(scores[:split], float), np.array(scores[split:], float)
    result = detection(id_scores, ood_scores)
    caught = next(t for t in np.sort(ood_scores)[::-1] if np.mean(ood_scores >= t) >= 0.95)
    assert result.fpr95_id_lost == pytest.approx(np.mean(id_scores >= caught))
    kept = next(t for t in np.sort(id_scores) if np.mean(id_scores <= t) >= 0.95)
    assert result.fpr95_ood_let_in == pytest.approx(np.mean(ood_scores <= kept))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 2 OOD scores are NaN or infinite"):
        detection(np.zeros(2), np.array([0.0, bad]))


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ID scores have shape \(0,\)"):
        detection(np.zeros(0), np.zeros(2))


@pytest.fixture(scope="module")
def compute_all_metrics() -> Callable[..., list[float]]:
    """OpenOOD's own function, read from its file, as importing its package needs far more than that."""
    spec = importlib.util.find_spec("openood")
    roots = [Path(p).parent for p in (spec.submodule_search_locations or [])] if spec else []
    roots += [Path(os.environ["OPENOOD_HOME"])] if os.environ.get("OPENOOD_HOME") else []
    files = [f for root in roots if (f := root / "openood/evaluators/metrics.py").is_file()]
    if not files:
        pytest.skip(
            "OpenOOD is missing; supply it by git clone https://github.com/Jingkang50/OpenOOD DIR and OPENOOD_HOME=DIR"
        )
    module_spec = importlib.util.spec_from_file_location("openood_metrics", files[0])
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.compute_all_metrics  # type: ignore[no-any-return]


@pytest.mark.parametrize("decimals", [1, 2, 15], ids=["many ties", "some ties", "no ties"])
def test_metrics_equal_openoods(compute_all_metrics: Callable[..., list[float]], decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    id_scores = rng.normal(0, 1, 300).round(decimals)
    ood_scores = rng.normal(1, 2, 211).round(decimals)
    ours = detection(id_scores, ood_scores)
    label = np.concatenate([rng.integers(0, 10, 300), np.full(211, -1)])
    with np.printoptions():  # OpenOOD's function changes them
        theirs = compute_all_metrics(-np.concatenate([id_scores, ood_scores]), label, label)
    expected = (ours.fpr95_id_lost, ours.auroc, ours.aupr_in, ours.aupr_out)
    assert theirs[:4] == pytest.approx(expected, rel=1e-12)
    assert ours.fpr95_ood_let_in != pytest.approx(ours.fpr95_id_lost)


# ---------------------------------------------------------------- images


def test_digits_are_split_half_and_half_by_class_without_overlap() -> None:
    split = digit_images.digits()
    counts = np.bincount(split.train_labels), np.bincount(split.test_labels)
    assert sum(map(sum, counts)) == 1797 and np.abs(counts[0] - counts[1]).max() <= 1
    assert not _as_set(split.train_images) & _as_set(split.test_images)


@pytest.mark.parametrize("name", OOD_SETS)
def test_ood_images_are_deterministic_like_digits_in_form_and_none_is_a_digit(name: str) -> None:
    make, split = OOD_SETS[name], digit_images.digits()
    images = make(300)
    assert np.array_equal(images, make(300))
    assert not np.array_equal(images, make(300, seed=1000))
    assert images.shape == (300, 8, 8) and images.dtype == np.uint8 and images.max() <= 16
    assert len(_as_set(images)) > 295  # hardly a repetition
    assert not _as_set(images) & (_as_set(split.train_images) | _as_set(split.test_images))


@pytest.mark.parametrize("name", ["letters", "noise"])
def test_the_amount_of_ink_does_not_give_away(name: str) -> None:
    images, inked = OOD_SETS[name](899), digit_images.digits().test_images
    assert images.mean() == pytest.approx(inked.mean(), rel=0.05)
    assert np.mean(images == 0) == pytest.approx(np.mean(inked == 0), rel=0.05)
    assert np.mean(images == 16) == pytest.approx(np.mean(inked == 16), rel=0.05)


def test_letters_fill_the_height_and_leave_the_margins_as_digits_do() -> None:
    images = digit_images.letters(300)
    assert images[:, 0].any(axis=1).all() and images[:, -1].any(axis=1).all()
    assert not images[:, :, 0].any() and not images[:, :, -1].any()


def test_photo_patches_show_something() -> None:
    assert np.ptp(digit_images.photo_patches(300), axis=(1, 2)).min() >= 4


def test_network_input_is_enlarged_and_normalised() -> None:
    split = digit_images.digits()
    pixels = digits.network_input(split.train_images)
    assert pixels.shape == (898, 1, 16, 16) and pixels.dtype == torch.float32
    expected = (8 - split.train_images.mean()) / split.train_images.std()
    flat = digits.network_input(np.full((1, 8, 8), 8, dtype=np.uint8))
    torch.testing.assert_close(flat, torch.full((1, 1, 16, 16), float(expected)))


def _as_set(images: digit_images.Images) -> set[bytes]:
    return {image.tobytes() for image in images}


# ---------------------------------------------------------------- network and its cache


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    split = digit_images.digits()
    return digits.network_input(split.train_images[:128]), torch.from_numpy(split.train_labels[:128])


def test_training_is_cached_and_leaves_the_random_state(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    first = training.trained(*data, QUICK, 0, tmp_path)
    other_seed = training.trained(*data, QUICK, 1, tmp_path)
    monkeypatch.setattr(training, "train", None)  # from here on only the cache can answer
    again = training.trained(*data, QUICK, 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert _same_weights(first, again) and not _same_weights(first, other_seed)
    assert not again.training and all(p.requires_grad for p in again.parameters())
    images = data[0][:5]
    assert torch.equal(first(images), again(images))


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "other network", "not an archive"])
def test_a_damaged_cache_is_reported_and_replaced(data: tuple[Tensor, Tensor], tmp_path: Path, damage: str) -> None:
    good = training.trained(*data, QUICK, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    at = content.index(good.fc.weight.detach().numpy().tobytes())
    if damage == "other network":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(
            {
                "flipped bit": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
                "cut short": content[: len(content) // 2],
                "empty": b"",
                "not an archive": b"hello",
            }[damage]
        )
    with pytest.warns(UserWarning, match=f"{path.name} is unusable"):
        assert _same_weights(training.trained(*data, QUICK, 0, tmp_path), good)
    assert _same_weights(training.trained(*data, QUICK, 0, tmp_path), good)  # and no warning now
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_reported(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    with pytest.warns(UserWarning, match="Could not cache the network"):
        net = training.trained(*data, QUICK, 0, file)
    assert net(data[0]).shape == (128, 10)


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- methods and cost


def test_msp_and_energy_of_known_logits() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    pred, score = methods.msp(nn.Identity())(logits)
    assert pred.tolist()[0] == 0 and score.tolist() == pytest.approx([-0.75, -0.5])
    pred, score = methods.energy(nn.Identity())(logits)
    assert pred.tolist()[0] == 0 and score.tolist() == pytest.approx([-math.log(4), -math.log(2)])


def test_gaia_z_is_the_root_of_the_summed_squared_densities_of_non_zero_gradients() -> None:
    torch.manual_seed(0)
    net = SmallResNet(10, widths=(4, 4, 8), blocks=1).eval()
    images = torch.randn(6, 1, 16, 16)
    outputs: list[Tensor] = []
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda _, __, output: outputs.append(output)) for norm in norms]
    logits = net(images)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(logits.amax(dim=1).sum(), outputs)
    densities = torch.cat([gradient.ne(0).double().mean(dim=(2, 3)) for gradient in gradients], dim=1)
    pred, score = methods.METHODS["gaia-z"](net)(images)
    assert torch.equal(pred, logits.argmax(dim=1))
    torch.testing.assert_close(score.double(), densities.square().sum(dim=1).sqrt(), rtol=1e-6, atol=0)


def test_cost_is_scoring_time_over_forward_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            nonlocal clock
            clock += 0.01
            return images

    def scorer(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal clock
        clock += 0.035
        return images, images

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    measured = cost.measure(Net(), scorer, torch.zeros(7, 1))
    assert measured.forwards == pytest.approx((3.5, 3.5, 3.5))
    assert measured.images_per_second == pytest.approx(200)


# ---------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments of a run with a network that is trained in no time."""
    monkeypatch.setitem(side_by_side.SOURCES, "digits", functools.partial(digits.load, recipe=QUICK))
    monkeypatch.setattr(cost, "MIN_SECONDS", 0)
    return ["--limit", "20", "--batch-size", "16", "--device", "cpu", "--cache", str(tmp_path / "cache")]


def test_a_small_run_end_to_end(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [*quick, "--seed", "3", "--out", str(out)]
    assert side_by_side.main(arguments) == 0
    assert sorted(file.name for file in out.iterdir()) == ["results.csv", "results.json", "results.md"]

    frame = pd.read_csv(out / "results.csv")
    rows = [(group, name) for group, name in (("near", "letters"), ("far", "photos"), ("far", "noise"))]
    assert list(zip(frame["group"], frame["OOD set"], frame["method"], strict=True)) == [
        (*row, method) for row in rows for method in methods.METHODS
    ]
    percent = frame.loc[:, "AUROC":"ID accuracy"].to_numpy()
    assert percent.shape[1] == 6 and percent.min() >= 0 and percent.max() <= 100
    assert frame["ID accuracy"].nunique() == 1  # the detectors' predictions are the network's

    printed, written = capsys.readouterr().out, (out / "results.md").read_text()
    for text in (printed, written):
        for word in (
            "FPR95 ID lost",
            "FPR95 OOD let in",
            "(OpenOOD)",
            "(paper)",
            *methods.METHODS,
            "letters",
        ):
            assert word in text
    for value in frame["AUROC"]:
        assert f"{value:.2f}" in printed and f"{value:.2f}" in written

    record = json.loads((out / "results.json").read_text())
    pd.testing.assert_frame_equal(pd.DataFrame(record["results"]), frame)
    assert record["seed"] == 3 and record["batch_size"] == 16 and "--limit 20" in record["command"]
    assert record["versions"]["torch"] == torch.__version__ and record["hardware"]["processor"]
    assert "commit" in record
    assert [images["images"] for images in record["sets"]] == [20] * 4


def test_the_table_holds_the_metrics_of_the_methods_scores(quick: list[str], tmp_path: Path) -> None:
    assert side_by_side.main([*quick, "--methods", "energy", "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv").set_index("OOD set")
    suite = side_by_side.SOURCES["digits"](0, tmp_path / "cache")
    scorer = methods.energy(suite.network)
    known = scorer(torch.stack([suite.in_distribution.dataset[i][0] for i in range(20)]))[1].numpy()
    for images in suite.out_of_distribution:
        unknown = scorer(torch.stack([images.dataset[i][0] for i in range(20)]))[1].numpy()
        expected = detection(known, unknown)
        assert frame.loc[images.name, "AUROC"] == pytest.approx(100 * expected.auroc)
        assert frame.loc[images.name, "FPR95 ID lost (OpenOOD)"] == pytest.approx(100 * expected.fpr95_id_lost)
        assert frame.loc[images.name, "FPR95 OOD let in (paper)"] == pytest.approx(100 * expected.fpr95_ood_let_in)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_finished_methods_survive_an_interruption(
    quick: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
) -> None:
    def broken(net: nn.Module) -> methods.Scorer:
        raise error

    monkeypatch.setitem(methods.METHODS, "energy", broken)
    arguments = [*quick, "--methods", "msp", "energy", "gaia-z", "--out", str(tmp_path)]
    if error is KeyboardInterrupt:
        assert side_by_side.main(arguments) == 130
    else:
        with pytest.raises(error):
            side_by_side.main(arguments)
    assert set(pd.read_csv(tmp_path / "results.csv")["method"]) == {"msp"}
    printed = capsys.readouterr()
    assert "msp" in printed.out and "gaia-z" not in printed.out
    assert ("1 of 3 methods finished" in printed.err) == (error is KeyboardInterrupt)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--limit", "0"],
        ["--batch-size", "-1"],
        ["--methods", "mps"],
        ["--data", "x"],
        ["--device", "gpu"],
        ["--device", "cuda:99"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        side_by_side.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_job_imports_neither_torchvision_nor_openood(tmp_path: Path) -> None:
    program = f"""
import functools, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import side_by_side, torch
from comparison import cost, digits, training
torch.set_num_threads(1)
side_by_side.SOURCES["digits"] = functools.partial(
    digits.load, recipe=training.Recipe(widths=(4, 4, 8), blocks=1, epochs=1)
)
cost.MIN_SECONDS = 0
side_by_side.main(["--limit", "4", "--cache", {str(tmp_path)!r}])
print("imported:", sorted({{"torchvision", "openood"}} & set(sys.modules)))
"""
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("imported: []\n")


def test_the_script_runs_by_its_path(tmp_path: Path) -> None:
    run = [sys.executable, str(BENCHMARKS / "side_by_side.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--batch-size" in result.stdout
