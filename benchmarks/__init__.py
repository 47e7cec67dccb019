"""Triglot beside its peers on one machine: `python -m benchmarks.training`; `--help` says what is measured."""
