"""Benchmarks: a file is a suite, its protocol card is cards/<name>.yaml."""
