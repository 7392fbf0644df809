"""Model families: a file is a family."""
