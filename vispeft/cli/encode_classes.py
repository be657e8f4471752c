"""``vispeft encode-classes``: write the class embeddings of a CLIP, for classifying images without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vispeft.cli.common import console, make_parser
from vispeft.errors import ConfigError, FileError, counted
from vispeft.interop.open_clip import TEMPLATES, encode_classes, load_clip
from vispeft.interop.staging import check_free

__all__ = ["main"]

EXAMPLE = """examples:
  vispeft encode-classes names.txt --clip ViT-B-16-quickgelu --weights ViT-B-16.pt --out classes.safetensors
  vispeft encode-classes names.txt --clip ViT-B-16 --weights open_clip_model.safetensors --out classes.safetensors \\
      --template "a centered satellite photo of {}." --template "a satellite photo of {}."

NAMES is a text file with a class name a line, as the data have them. Needs the extra clip (open_clip). Weights are
never downloaded: place the checkpoint where --weights says."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("encode-classes", "Write class embeddings by the text tower of a CLIP.", EXAMPLE)
    parser.add_argument("names", metavar="NAMES", help="text file with a class name a line")
    parser.add_argument("--clip", metavar="NAME", required=True, help="open_clip's name of the architecture")
    parser.add_argument("--weights", metavar="FILE", required=True, help="its checkpoint")
    parser.add_argument("--out", metavar="FILE", required=True, help="the file, ending in .safetensors")
    parser.add_argument("--template", action="append", metavar="TEXT", help=f"text with {{}}; default {TEMPLATES[0]!r}")
    given = parser.parse_args(list(argv))
    out = Path(given.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is {str(out)!r}; the name should end in .safetensors.")
    check_free(out)
    names = _names(Path(given.names))
    model, tokenize = load_clip(given.clip, given.weights)
    templates = tuple(given.template or TEMPLATES)
    source = f"open_clip {given.clip}, {Path(given.weights).name}, {' | '.join(templates)}"
    found = encode_classes(model, tokenize, names, templates, source)
    found.save(out)
    console.print(f"{counted(len(names), 'class')} in {found.embeddings.shape[1]} dimensions: {out}", soft_wrap=True)


def _names(path: Path) -> list[str]:
    """Read class names, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise FileError(f"{path} cannot be read as a list of class names: {error}.") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise FileError(f"{path} has no class names; write one a line.")
    return names
