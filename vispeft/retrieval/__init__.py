"""Indices of embedded images: collecting, storing and searching them."""

from vispeft.retrieval.approximate import KINDS
from vispeft.retrieval.building import Builder, Built
from vispeft.retrieval.collection import Collection, collect, collect_split
from vispeft.retrieval.index import Index, Model
from vispeft.retrieval.searching import Found, Hit, neighbours_of, picture_name, search_table

__all__ = [
    "KINDS",
    "Builder",
    "Built",
    "Collection",
    "Found",
    "Hit",
    "Index",
    "Model",
    "collect",
    "collect_split",
    "neighbours_of",
    "picture_name",
    "search_table",
]
