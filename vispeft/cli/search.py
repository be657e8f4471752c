"""``vispeft search``: find the nearest images of an index for query images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from vispeft.cli.common import console, make_parser
from vispeft.cli.embed import Embedder
from vispeft.cli.reading import check_names
from vispeft.cli.runs import Run
from vispeft.core.token_merging import TokenMerging
from vispeft.data.images import Reading, read_image
from vispeft.errors import ConfigError, FileError, check_count, counted
from vispeft.retrieval import Collection, Found, Index, collect, neighbours_of, picture_name, search_table
from vispeft.storage.disk import write_atomically
from vispeft.viz import Neighbour, NeighbourRow, draw_neighbours

__all__ = ["main", "search"]

EXAMPLE = """example:
  vispeft search index my_query.jpg
  vispeft search index my_queries --neighbours 5 --out found

QUERY is an image, a folder (its subfolders are labels) or a list, as for `vispeft embed`; several may be given. The
neighbours are printed. With --out they are written as neighbours.csv and neighbours.json, with a picture for each
query, in which neighbours with its label have a green frame and others a dashed one. A query that is an image of the
index is left out of its own neighbours."""

SHOWN = 10
"""Queries whose neighbours are printed."""
DRAWN = 400
"""Longest side of an image in a picture, in pixels: about twice as many as are shown."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("search", "Find the nearest images of an index for query images.", EXAMPLE)
    parser.add_argument("index", metavar="INDEX", help="directory of the index, made by `vispeft embed`")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="image, folder or list")
    parser.add_argument("--neighbours", type=int, default=10, metavar="N", help="neighbours of each query; default 10")
    parser.add_argument("--out", metavar="DIR", help="folder for tables and pictures")
    parser.add_argument("--run", metavar="RUN", help="run directory; by default where it was when the index was made")
    parser.add_argument("--exact", action="store_true", help="compute all scores, also of an index of faiss")
    parser.add_argument("--max_pixels", type=int, help="largest number of pixels of a query; default: as trained")
    given = parser.parse_args(list(argv))
    out = None if given.out is None else Path(given.out)
    if out is not None:
        _check_empty(out)
    index = Index.open(given.index)
    settings = {"count": given.neighbours, "run": given.run, "exact": given.exact, "max_pixels": given.max_pixels}
    found = search(index, given.queries, **settings)
    for entry in found[:SHOWN]:
        console.print(_table(entry))
    if len(found) > SHOWN:
        rest = "--out writes them" if out is None else "they are in the tables"
        console.print(f"and {len(found) - SHOWN} more queries; {rest}.")
    if out is not None:
        # The queries were read within their limit, and the neighbours are the files that were embedded.
        _write(found, out, Reading(**index.model.reading, max_pixels=sys.maxsize))
        console.print(f"{counted(len(found), 'query', 'queries')}: {out}", soft_wrap=True)


def search(
    index: str | Path | Index,
    queries: str | Path | Sequence[str | Path],
    *,
    count: int = 10,
    run: str | Path | None = None,
    batch_size: int = 64,
    exact: bool = False,
    max_pixels: int | None = None,
) -> list[Found]:
    """Find the nearest images of an index for query images.

    Args:
        index: The index, or its directory.
        queries: Images, folders or lists, as `embed` takes them.
        count: Number of neighbours of each query; fewer are found in a smaller index.
        run: Run directory; None for where it was when the index was made.
        batch_size: Queries at a time.
        exact: Whether to compute all scores although the index is one of faiss.
        max_pixels: Largest number of pixels of a query; None for that of the training.

    Returns:
        The neighbours of each query.

    Raises:
        ConfigError: If settings cannot work.
        DataError: If an image cannot be read.
        FileError: If the index, or an image that was found, was changed, or the run is another than the index was made
            by.
    """
    check_count("--neighbours", count)
    check_count("--batch_size", batch_size)
    opened = index if isinstance(index, Index) else Index.open(index)
    given = [queries] if isinstance(queries, str | Path) else queries
    joined = Collection.joined([collect(place) for place in given])
    check_names(joined.paths, "searched for")
    try:
        source = Run.open(opened.run if run is None else run)
    except FileError as error:
        hint = " Say where the run is now by --run." if run is None else ""
        raise FileError(f"{opened.place} was made by {opened.run}. {error}{hint}") from error
    # Queries are few, and processes take time to start.
    embedder = Embedder(source, max_pixels, workers=0, token_merging=_merging_of(opened))
    other = embedder.model.differences(opened.model)
    if other:
        raise FileError(
            f"{opened.place} was made by another model than {source.path} has: {'; '.join(other)} (in the index). "
            "Scores of embeddings of two models mean nothing. Embed the images again."
        )
    return neighbours_of(opened, joined, embedder.all(joined, batch_size), count, exact)


def _merging_of(opened: Index) -> TokenMerging:
    """Return the token merging with which an index was made."""
    try:
        return TokenMerging(**opened.model.token_merging)
    except TypeError as error:
        raise FileError(
            f"{opened.place} has settings of token merging that this version does not know: {error}."
        ) from error


def _check_empty(out: Path) -> None:
    try:
        there = out.exists() and any(out.iterdir())
    except OSError as error:
        raise FileError(f"--out is {out}, where nothing can be written ({error.strerror}).") from error
    if there:
        raise ConfigError(f"{out} is not empty, and nothing in it is overwritten. Choose another --out.")


def _table(found: Found) -> Table:
    label = f" ({found.label})" if found.label else ""
    table = Table(title=f"{found.query}{label}", title_justify="left")
    for column, justify in (("rank", "right"), ("score", "right"), ("label", "left"), ("image", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for rank, hit in enumerate(found.hits, start=1):
        mark = {True: " =", False: " x", None: ""}[hit.right]
        table.add_row(str(rank), f"{hit.score:.4f}", f"{hit.label}{mark}", hit.path)
    return table


def _write(found: Sequence[Found], out: Path, reading: Reading) -> None:
    taken: set[str] = set()
    for entry in found:
        neighbours = [
            Neighbour(
                image=_small(read_image(hit.path, reading=reading)), score=hit.score, right=hit.right, title=hit.label
            )
            for hit in entry.hits
        ]
        title = entry.label or Path(entry.query).stem
        row = NeighbourRow(image=_small(read_image(entry.query, reading=reading)), title=title, neighbours=neighbours)
        draw_neighbours([row], out / "pictures" / picture_name(entry.query, taken))
    text = json.dumps([entry.to_dict() for entry in found], indent=1, ensure_ascii=False)
    write_atomically({out / "neighbours.csv": search_table(found).encode(), out / "neighbours.json": text.encode()})


def _small(image: Tensor) -> Tensor:
    """Shrink an image (3, H, W), uint8, whose longer side is longer than the picture can show."""
    shrink = DRAWN / max(image.shape[1:])
    if shrink >= 1:
        return image
    size = [max(1, round(side * shrink)) for side in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
