"""The parts of ``benchmarks/throughput.py``.

No trained weights are needed: speed does not depend on their values as long as activations and logits have the scale
of a trained network's. Torchvision is imported for its network only, OpenOOD not at all.
"""
