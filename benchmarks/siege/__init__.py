"""The parts of ``benchmarks/siege.py``: projects to attack, attacks by kind, the table."""
