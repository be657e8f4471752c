"""Serving: many adapters answer from one backbone, in Python (`serve`) and over HTTP (``vispeft serve``)."""

from vispeft.serving.server import Server, serve

__all__ = ["Server", "serve"]
