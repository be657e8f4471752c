"""Hosts: everything that takes part in a forward pass."""
