# %% [markdown]
# # Tutorial: from a classifier to scores and a heat map
#
# This page is a script, `docs/tutorial.py`: run it with `python docs/tutorial.py` after `pip install -e ".[bench]"`,
# or open it as a notebook with Jupytext. It takes a few seconds on a CPU, downloads nothing and writes `tutorial.png`
# to the current folder. Every build of this site runs it, and its assertions hold what the text says.
#
# ## A classifier
#
# The digits 0 to 7 of scikit-learn are in-distribution (ID). The digits 8 and 9 are near-OOD: the same kind of image,
# of classes that the network does not know. Snippets of photographs are far-OOD.

# %%
import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import nn

from openood_sandi import SandI

matplotlib.use("Agg")  # draw into files; leave this line out in a notebook
from matplotlib import pyplot as plt

torch.manual_seed(0)
rng = np.random.default_rng(0)

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), 0 to 1
images = nn.functional.interpolate(images, size=24, mode="bilinear")
labels = torch.tensor(digits.target)
known = labels < 8
train, test = images[known][:1000], images[known][1000:]
near = images[~known]

photo = torch.tensor(np.stack(load_sample_images().images) / 255, dtype=torch.float32).mean(-1)  # (2, 427, 640)
corners = zip(rng.integers(0, 2, 400), rng.integers(0, 403, 400), rng.integers(0, 616, 400), strict=True)
far = torch.stack([photo[which, top : top + 24, left : left + 24] for which, top, left in corners])[:, None]

# %% [markdown]
# Any eager PyTorch classifier will do. This one has three convolutions with batch norms, and is trained for a few
# seconds.


# %%
def block(channels_in: int, channels: int) -> list[nn.Module]:
    """A convolution with its batch norm and rectifier, at half the resolution afterwards."""
    convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.AvgPool2d(2)]


net = nn.Sequential(
    *block(1, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 8)
)
optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(8):
    for batch in torch.randperm(1000).split(50):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(train[batch]), labels[known][:1000][batch]).backward()
        optimiser.step()
net.eval()

accuracy = (net(test).argmax(1) == labels[known][1000:]).float().mean().item()
print(f"accuracy on ID test images: {accuracy:.1%}")
assert accuracy > 0.9

# %% [markdown]
# ## Scores
#
# `SandI(net)` finds the split points on the first batch (here the three batch norms) and leaves the network as it
# found it. Larger scores mean "more out-of-distribution". Beside it stands the simplest detector there is, the maximum
# softmax probability (MSP).

# %%
detector = SandI(net)


def msp(x: torch.Tensor) -> torch.Tensor:
    """The negative maximum softmax probability (B,) of images (B, C, H, W): larger = more out-of-distribution."""
    with torch.no_grad():
        return -net(x).softmax(1).amax(1)


def auroc(score_id: torch.Tensor, score_ood: torch.Tensor) -> float:
    """The share of pairs of an ID and an OOD image in which the OOD image has the larger score."""
    truth = [0] * len(score_id) + [1] * len(score_ood)
    return float(roc_auc_score(truth, torch.cat([score_id, score_ood])))


measured = {}
for name, score in {"S&I": lambda x: detector(x)[1], "MSP": msp}.items():
    measured[name] = {"near": auroc(score(test), score(near)), "far": auroc(score(test), score(far))}
    print(name, {distance: f"{value:.1%}" for distance, value in measured[name].items()})
print("split points:", detector.split_names)

# %% [markdown]
# With torch 2.14 and this seed S&I has an AUROC of 100 % on photographs, where MSP has 76 %, and of 71 % on the unknown
# digits, where MSP has 96 %; four other seeds say the same. It is what [larger measurements](results.md) show, too: S&I
# tells images of another kind, and is no help with unknown classes of the same kind.

# %%
assert measured["S&I"]["far"] > measured["MSP"]["far"]
assert measured["S&I"]["near"] < measured["MSP"]["near"]

# %% [markdown]
# ## A threshold
#
# A detector becomes a decision by a threshold that keeps, say, 95 % of ID images. Take it from images that the network
# has not been trained on and that you do not report on.

# %%
held_out, reported = test[::2], test[1::2]
detector.fit(train, val=held_out, tpr=0.95)
print(f"threshold: {detector.threshold:.4g}")
sets = {"ID": reported, "near": near, "far": far}
rejected = {name: detector.is_ood(x).float().mean().item() for name, x in sets.items()}
print({name: f"{share:.1%}" for name, share in rejected.items()})
assert rejected["ID"] < 0.15 and rejected["far"] > 0.9

# %% [markdown]
# ## A heat map
#
# `explain` gives the attribution map of Eq. 10 at every split, summed over channels: where in the image the gradients
# along the path of the attack come from.

# %%
shown = torch.cat([test[:2], near[:1], far[:1]])
maps = detector.explain(shown)
titles = ["image", *maps]
figure, axes = plt.subplots(4, len(titles), figsize=(1.7 * len(titles), 6.4))
for row, label in enumerate(("ID", "ID", "near-OOD", "far-OOD")):
    panels = [shown[row, 0], *(split[row].abs() for split in maps.values())]
    for column, panel in enumerate(panels):
        axis = axes[row, column]
        axis.imshow(panel.detach(), cmap="gray" if column == 0 else "inferno")
        axis.set(xticks=[], yticks=[])
        if row == 0:
            axis.set_title("image" if column == 0 else f"split {titles[column]}")
    axes[row, 0].set_ylabel(label)
figure.tight_layout()
figure.savefig("tutorial.png", dpi=100)

# %% [markdown]
# ![attribution maps of four images](tutorial.png)
#
# Next: [every option](options.md), [your own data and OpenOOD](../README.md#in-openood), [how it
# works](architecture.md).
