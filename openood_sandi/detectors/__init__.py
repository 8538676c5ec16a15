"""Detectors, one paper a file; each describes itself in a literal named ``INFO``."""
