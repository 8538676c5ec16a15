"""The parts of ``benchmarks/side_by_side.py``: data, network, methods, metrics, cost, report.

Nothing here imports torchvision or OpenOOD: the comparison runs wherever torch runs.
"""
