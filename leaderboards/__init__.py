"""Published numbers, table layouts and claims."""
