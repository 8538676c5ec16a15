"""S&I: Zhang et al., ICML 2025."""

from openood_sandi.detectors.info import DetectorInfo

INFO = DetectorInfo(
    name="sandi",
    label="S&I",
    detector="openood_sandi.detectors.sandi.detector:SandI",
    title="Splitting & Integrating: Out-of-Distribution Detection via Adversarial Gradient Attribution",
    venue="ICML",
    year=2025,
    url="https://proceedings.mlr.press/v267/zhang25by.html",
)
