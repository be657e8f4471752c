"""Hostile input, made at random: each case is refused with one of the project's errors, or works; see README.md."""
