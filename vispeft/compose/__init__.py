"""Arithmetic on changes of weights, one matrix at a time: sums, TIES, DARE, and terms of low rank.

Everything here acts on changes ``W' - W``, never on the factors of low-rank terms. `AdapterBank.compose` applies it to
whole adapters.
"""
