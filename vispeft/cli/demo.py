"""``vispeft demo``: try finished runs and adapters of the zoo in a browser, on images of one's own."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vispeft.cli.common import console, make_parser
from vispeft.cli.demo_models import Answer, Model, load_models
from vispeft.data.images import Reading, read_image, read_size
from vispeft.errors import ConfigError, DataError, VispeftError, counted

__all__ = ["main", "make_page", "serve"]

logger = logging.getLogger(__name__)

EXAMPLE = """example:
  vispeft demo zoo:digits_ssf zoo:digits_lora
  vispeft demo runs/folder/1 runs/folder/2 --port 7861
  vispeft demo runs/emoji_lora/1 --gallery my_catalogue

Drop an image and choose an adapter: class probabilities, overlays, maps of the tasks or nearest neighbours are shown,
and where the last block looks. Adapters of one backbone share it, so that choosing another one costs no time. The page
is served to this machine alone unless --host says otherwise, and asks nothing of the network. It needs the extra demo:
pip install "vispeft[demo]"."""

FONTS = ["system-ui", "sans-serif"]
"""Fonts of the reader's own machine; gradio's default is fetched from a server."""
LARGEST = 4096
"""Longest side of an image in pixels; larger ones are for `vispeft predict`."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("demo", "Try adapters in a browser, on images of your own.", EXAMPLE)
    parser.add_argument("runs", metavar="zoo:NAME|RUN", nargs="+", help="adapters of the zoo, or run directories")
    parser.add_argument("--gallery", metavar="IMAGES", help="images in which runs of metric learning find neighbours")
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at; default this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    given = parser.parse_args(list(argv))
    _gradio()  # before the backbones are loaded
    models = load_models(given.runs, given.gallery)
    backbones = len({id(model.task.model) for model in models.values()})
    told = f"{counted(len(models), 'adapter')} on {counted(backbones, 'backbone')}"
    console.print(f"{told}: http://{given.host}:{given.port} (Ctrl-C ends it)", soft_wrap=True)
    serve(models, given.host, given.port, wait=True)


def _gradio() -> Any:
    """Import gradio, with its analytics and its search for a later version off.

    Raises:
        ConfigError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f'vispeft demo needs the extra demo: pip install "vispeft[demo]" ({error}).') from error
    return gradio


def serve(models: Mapping[str, Model], host: str, port: int, *, wait: bool) -> Any:
    """Serve the page.

    Args:
        models: The models by their names.
        host: Address that is listened at.
        port: Its port.
        wait: Whether to return only when the server is stopped.

    Returns:
        gradio's page, whose ``close`` stops the server.

    Raises:
        ConfigError: If the port is taken.
    """
    gradio = _gradio()
    page = make_page(models)
    theme = gradio.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    settings = {
        "server_name": host,
        "server_port": port,
        "share": False,
        "quiet": True,
        "prevent_thread_lock": not wait,
    }
    try:
        page.launch(**settings, theme=theme, footer_links=[], ssr_mode=False, css=_CSS)
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be listened at ({error}). Choose another --port.") from error
    return page


_CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
footer { display: none !important; }
#pictures .grid-container { padding-top: 2rem; }
#pictures .caption-label { max-width: 100% !important; white-space: normal !important; overflow: visible !important; }
@media (max-width: 640px) {
  #pictures .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
"""
"""Pictures begin below their label, their names are whole, and a phone has two of them in a row."""

_BUTTONS = ["download", "fullscreen"]
"""Buttons over a picture; gradio's own choice has one that uploads it."""


def make_page(models: Mapping[str, Model]) -> Any:
    """Make the page of the demo.

    Args:
        models: The models by their names.
    """
    gradio = _gradio()
    names = list(models)
    with gradio.Blocks(title="vispeft demo", analytics_enabled=False) as page:
        gradio.HTML("<h1>vispeft demo</h1><p>Drop an image, and choose an adapter.</p>")
        with gradio.Row():
            with gradio.Column(min_width=300):
                # The file as it is: gradio's own conversion reads a GIF as its palette, and clips 16 bits.
                image = gradio.Image(
                    type="filepath", image_mode=None, label="image", sources=["upload", "clipboard"], height=320
                )
                chosen = gradio.Dropdown(names, value=names[0], label="adapter")
                facts = gradio.HTML(_facts(models[names[0]]))
            with gradio.Column(min_width=300):
                probabilities = gradio.Label(num_top_classes=5, label="probabilities", visible=False)
                pictures = gradio.Gallery(
                    label="pictures",
                    visible=False,
                    columns=3,
                    object_fit="contain",
                    height=440,
                    buttons=_BUTTONS,
                    elem_id="pictures",
                )
                text = gradio.Textbox(label="numbers", visible=False, lines=4)
                attention = gradio.Image(
                    label="where the last block looks", visible=False, height=320, buttons=_BUTTONS
                )

        def show(file: str | None, name: str) -> list[Any]:
            model = models[name]
            if file is None:
                return [_facts(model), *(gradio.update(visible=False) for _ in range(4))]
            try:
                answer = model.answer(read_upload(Path(file), model.reading))
            except VispeftError as error:
                raise gradio.Error(str(error)) from error
            return [_facts(model), *_updates(gradio, answer)]

        outputs = [facts, probabilities, pictures, text, attention]
        for part in (image, chosen):
            part.change(show, [image, chosen], outputs, show_progress="minimal", api_name=False)
    return page


def _facts(model: Model) -> str:
    return f"<p>{html.escape(model.facts)}</p>"


def read_upload(file: Path, reading: Reading) -> Tensor:
    """Read an image as `vispeft predict` reads it.

    Args:
        file: The file.
        reading: How the pixels of the model's images become RGB.

    Returns:
        uint8 (3, H, W).

    Raises:
        ConfigError: If the image is larger than the demo takes.
        DataError: If it cannot be read.
    """
    try:
        height, width = read_size(file, reading)
    except DataError as error:  # the folder is one of gradio's
        raise DataError(str(error).replace(str(file), file.name)) from error
    if max(height, width) > LARGEST:
        raise ConfigError(
            f"The image has {width} x {height} pixels; the demo takes up to {LARGEST} a side. `vispeft predict` takes "
            "larger ones."
        )
    return read_image(file, file.name, reading)


def _updates(gradio: Any, answer: Answer) -> list[Any]:
    """Fill what the task of the model has an answer for, and hide the rest."""
    found = answer.probabilities
    return [
        gradio.update(value=found or None, visible=bool(found)),
        gradio.update(value=answer.pictures, visible=bool(answer.pictures)),
        gradio.update(value=answer.text, visible=bool(answer.text)),
        gradio.update(value=answer.attention, visible=answer.attention is not None),
    ]
