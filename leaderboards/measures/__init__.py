"""Measurements on the testbed that claims are put to: a function takes a seed and options and returns a number for each arm."""
