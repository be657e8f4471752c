"""Proxies of classes for metric learning that a second pass of the backbone computes; parts of training alone."""
