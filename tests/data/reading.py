"""Shared by the tests of readers: data made ready for a backbone, and the names a split holds."""

from vispeft.data import Preprocessing

BACKBONE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def ready(data):
    data.fit_to(BACKBONE)
    data.setup()
    return data


def names_of(split):
    return [split.source.name(index) for index in range(len(split))]
