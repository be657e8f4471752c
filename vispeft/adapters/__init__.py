"""Adapters on a model: the bank, which attaches, switches, verifies, merges and saves them."""
