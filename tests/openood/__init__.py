"""S&I inside a real OpenOOD; what needs a checkout is skipped where there is none."""
