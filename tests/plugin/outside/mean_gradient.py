"""A detector from outside: the score is the mean of |d max logit / dz|, summed over the split points."""

import torch

from openood_sandi import DetectorInfo, Objective, Observer, SplitNetwork, Walk, register


class Sum(Observer):
    total = 0.0

    def gradient(self, site, gradient):
        self.total = self.total + gradient.abs().flatten(1).mean(1)


class MeanGradient:
    def __init__(self, net, *, splits="last_stage"):
        self.network = SplitNetwork(net, splits=splits)

    def __call__(self, x):
        pred, score = zip(*self.network.over(x, self.part, list), strict=True)
        return torch.cat(pred), torch.cat(score)

    def part(self, x):
        found = Sum()
        logits = self.network.walk(x, Walk(self.losses), found)
        return logits.argmax(1), found.total

    def losses(self, logits, feature):
        def max_logit(logits, feature):
            return logits.amax(-1).sum()

        return {split.site: Objective(max_logit, max_logit) for split in self.network.splits}


INFO = DetectorInfo(
    name="mean_gradient", label="Mean gradient", detector="mean_gradient:MeanGradient", title="-", venue="-", url="-"
)
register(INFO)
