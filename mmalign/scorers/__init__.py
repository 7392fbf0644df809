"""Scorers: a file is a scorer, the metric of a benchmark and the reward of a trainer."""
