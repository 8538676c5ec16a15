"""The parts of ``benchmarks/throughput.py``: networks, methods, the loops to beat, measuring, scaling, report.

Nothing here imports torchvision or OpenOOD, and no weights are needed: speed does not depend on their values as long
as activations and logits have the scale of a trained network's.
"""
