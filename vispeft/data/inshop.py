"""In-Shop Clothes Retrieval of DeepFashion (Liu et al., CVPR 2016): queries are answered by a gallery."""

from __future__ import annotations

from dataclasses import replace

from vispeft.data.lists import list_splits
from vispeft.data.metric_listing import ListedRoles, RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, find_place, read_rows
from vispeft.data.targets import Entry
from vispeft.errors import DataError

__all__ = ["InShopMetricData"]

PARTITION = "list_eval_partition.txt"


class InShopMetricData(PublishedMetricData):
    """In-Shop: 25,882 images of 3,997 items for training; 14,218 queries and a gallery of 12,612 of 3,985 others.

    Read from ``Eval/list_eval_partition.txt`` or ``list_eval_partition.txt``, with the images below the folder itself
    or below ``Img``. Items of queries and gallery have one table of classes.
    """

    title = "In-Shop"
    counts = {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)}

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If the list is missing or damaged.
        """
        _, place = find_place(self.title, self.root, [("Eval", [PARTITION]), (".", [PARTITION])])
        # The number of images, a header; then path, item and split.
        rows = read_rows(place / PARTITION, 3, skip=2)
        entries: dict[str, list[Entry]] = {"train": [], "query": [], "gallery": []}
        for where, (path, item, split) in rows:
            number = item.rpartition("_")[2]
            if split not in entries or not number.isdecimal():
                raise DataError(
                    f"{where} of {place / PARTITION} has item {item!r} and split {split!r}; an item ends in _ and a "
                    f"number, and splits are {', '.join(entries)}."
                )
            entries[split].append(Entry(path, int(number), where))
        images = self.root / "Img" if (self.root / "Img" / "img").is_dir() else self.root
        found = list_splits(str(place), entries, images, renumber=True)
        test = ListedRoles.of(found.splits["query"], found.splits["gallery"])
        return self.published_listing(replace(found, splits={"train": found.splits["train"], "test": test}))
