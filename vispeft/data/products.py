"""Stanford Online Products for metric learning: photos of things for sale, several of each (Song et al., 2016)."""

from __future__ import annotations

from vispeft.data.lists import list_splits
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.metric_published import PublishedMetricData, find_place, read_rows
from vispeft.data.targets import Entry

__all__ = ["SOPMetricData"]

LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}


class SOPMetricData(PublishedMetricData):
    """Stanford Online Products: 59,551 images of 11,318 classes for training, 60,502 of 11,316 others for the test.

    Read from ``Stanford_Online_Products/Ebay_{train,test}.txt`` with the images beside the lists, or from
    ``Info_Files/Ebay_{train,test}.txt`` with the images in ``images``.
    """

    title = "Stanford Online Products"
    counts = {"train": (59_551, 11_318), "test": (60_502, 11_316)}

    def read(self) -> RetrievalListing:
        """List the images.

        Raises:
            DataError: If the folder has none of the layouts, or a list is damaged.
        """
        apart = [*(f"Info_Files/{name}" for name in LISTS.values()), "images"]
        layouts = [("Stanford_Online_Products", [*LISTS.values()]), (".", [*LISTS.values()]), (".", apart)]
        layout, place = find_place(self.title, self.root, layouts)
        lists, images = (place / "Info_Files", place / "images") if layout == 2 else (place, place)
        # A header; then the numbers of image, class and kind of thing, and the path.
        entries = {
            split: [Entry(path, label, where) for where, (_, label, _, path) in read_rows(lists / name, 4, skip=1)]
            for split, name in LISTS.items()
        }
        return self.published_listing(list_splits(str(place), entries, images, renumber=True))
