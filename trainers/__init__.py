"""Training methods: a file is a method."""
