"""Fixtures that several test files share."""

from helpers.browser import browser  # noqa: F401
