"""The parts of ``benchmarks/side_by_side.py``: data, network, methods, metrics, cost, report.

Torchvision, OpenOOD and pytorch-ood are imported only where they are asked for: digits run wherever torch runs.
"""
