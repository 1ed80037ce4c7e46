"""Tests of the programs in `benchmarks/` that calculate: their figures are only as good as they are."""
