"""Benchmarks: ratios to named peers, timed in turn, with the machine's limits beside them.

Run ``make bench`` or ``pytest bench``; ``python -m bench.report`` draws the tables and plots from ``bench/results/``.
``docs/benchmarks.md`` says how a figure is made and how to bring a peer.
"""
