"""The benchmark harness: `python -m bench run SUITE`, `compare`, `report`, `tune`. See docs/benchmarks.md."""
