"""Writes image files byte by byte, so that what is read can be compared with the numbers that were written."""

import struct
import zlib

import numpy as np

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Colour type of PNG by number of bands; 3 is that of a palette."""


def packed(rows: np.ndarray, bits: int, order: str = ">") -> bytes:
    """Pack values (H, N) of 1 to 32 bits, each row to whole bytes."""
    if bits >= 8:
        return rows.astype(f"{order}{rows.dtype.kind if rows.dtype.kind in 'if' else 'u'}{bits // 8}").tobytes()
    places = (rows[..., None].astype(np.uint8) >> np.arange(bits)[::-1] & 1).reshape(len(rows), -1)
    return np.packbits(places, axis=1).tobytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Make a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def exif(orientation: int) -> bytes:
    """Make metadata that hold nothing but an orientation."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def png(
    pixels: np.ndarray, bits: int = 8, *, palette: np.ndarray | None = None, orientation: int = 0, late: bool = False
) -> bytes:
    """Write a PNG file.

    Args:
        pixels: Values (H, W), or (H, W, bands) for 2 to 4 bands.
        bits: Of each value.
        palette: Colours (N, 3), if the values are indices.
        orientation: Orientation in the metadata; 0 writes none.
        late: Whether the metadata stand behind the pixels.
    """
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = packed(pixels.reshape(len(pixels), -1), bits)
    width = len(rows) // len(pixels)
    lines = b"".join(b"\0" + rows[start : start + width] for start in range(0, len(rows), width))
    kind = COLOUR_TYPES[bands] if palette is None else 3
    turned = [chunk(b"eXIf", exif(orientation))] if orientation else []
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, kind, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette.astype(np.uint8).tobytes())] if palette is not None else []
    parts += ([] if late else turned) + [chunk(b"IDAT", zlib.compress(lines))] + (turned if late else [])
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(
    pixels: np.ndarray,
    bits: int = 8,
    *,
    order: str = "<",
    meaning: int = 1,
    apart: bool = False,
    extra: tuple[int, ...] = (),
    packing: int = 1,
    tags: tuple[tuple[int, int], ...] = (),
    palette: np.ndarray | None = None,
) -> bytes:
    """Write a TIFF file of one strip, or of one strip for each band.

    Args:
        pixels: Values (H, W) or (H, W, bands); signed and floating-point ones of up to 32 bits say so.
        bits: Of each value.
        order: ``<`` for little-endian, ``>`` for big-endian.
        meaning: Photometric interpretation: 0 white is zero, 1 black is zero, 2 RGB, 3 palette.
        apart: Whether bands stand one after the other.
        extra: Kinds of the bands beyond those of the meaning.
        packing: Compression: 1 none, 8 deflate.
        tags: Further tags of one short number each, such as the orientation.
        palette: Colours (2^bits, 3), if the values are indices.
    """
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    planes = np.moveaxis(pixels, 2, 0) if apart and bands > 1 else [pixels]
    strips = [packed(plane.reshape(len(plane), -1), bits, order) for plane in planes]
    strips = [zlib.compress(strip) if packing == 8 else strip for strip in strips]
    kind = 1 if pixels.dtype.itemsize == 8 else {"i": 2, "f": 3}.get(pixels.dtype.kind, 1)
    entries = {256: pixels.shape[1], 257: len(pixels), 258: [bits] * bands, 259: packing, 262: meaning, 277: bands}
    entries |= {278: len(pixels), 284: 2 if apart else 1, 338: list(extra), 339: [kind] * bands, **dict(tags)}
    if palette is not None:
        entries[320] = (palette.T.astype(int) * 257).ravel().tolist()
    entries[273], entries[279] = [0] * len(strips), [len(strip) for strip in strips]
    lists = {tag: values if isinstance(values, list) else [values] for tag, values in sorted(entries.items())}
    lists = {tag: values for tag, values in lists.items() if values}
    for _ in range(2):  # the second time, the places of the strips are known
        place = 8 + 2 + 12 * len(lists) + 4
        body, tail = b"", b""
        for tag, values in lists.items():
            long = tag in (256, 257, 273, 279)
            content = b"".join(struct.pack(f"{order}{'I' if long else 'H'}", value) for value in values)
            body += struct.pack(f"{order}HHI", tag, 4 if long else 3, len(values))
            if len(content) <= 4:
                body += content.ljust(4, b"\0")
            else:
                body += struct.pack(f"{order}I", place + len(tail))
                tail += content
        lists[273] = [place + len(tail) + sum(map(len, strips[:index])) for index in range(len(strips))]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(lists)) + body + b"\0" * 4 + tail + b"".join(strips)


def netpbm(pixels: np.ndarray, white: int, *, plain: bool = False) -> bytes:
    """Write a PBM (white 1), PGM or PPM file, as bytes or as text, with a comment in its header."""
    kind = (1 if white == 1 else 2 if pixels.ndim == 2 else 3) + (0 if plain else 3)
    head = f"P{kind}\n# made\n{pixels.shape[1]} {len(pixels)}\n" + (f"{white}\n" if white > 1 else "")
    if plain:
        return (head + "\n".join(" ".join(map(str, row.ravel().tolist())) for row in pixels)).encode()
    bits = 1 if white == 1 else 8 if white < 256 else 16
    return head.encode() + packed(pixels.reshape(len(pixels), -1), bits)
