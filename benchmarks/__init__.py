"""Triglot beside its peers on the same machine: `python -m benchmarks.training`, … ; `--help` says what each measures."""
