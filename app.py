"""A web page to search pictures: python app.py [--run RUN] [--images FOLDER], then open http://127.0.0.1:7860 in a browser."""

import contextlib
import html
import os
import sys
from pathlib import Path
from typing import Literal

import gradio as gr
import pandas as pd
from gradio.utils import get_upload_folder

from config import run_cli
from embedding import open_model
from search.gallery import open_gallery
from search.queries import (
    NUM_CAPTIONS,
    best_matches,
    classify_embedding,
    embed_captions,
    embed_file,
    embed_query,
    files_to_search,
    newest_run,
)
from utils.errors import UserError, run_command
from utils.images import read_image

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # otherwise gradio sends usage data and checks for a new version

EXAMPLES = ("python app.py", "python app.py --run runs/shapes --images ~/Pictures")
NUM_SHOWN, TILE_PIXELS = 12, 320  # matches to show, and the shorter side of each
MAX_CLASSES = 50
MAX_UPLOAD = 20  # MB
CACHE_CHECK, CACHE_AGE = 60, 600  # seconds: how often old temporary files are deleted, and from which age
CURVES = {  # column of history.csv: name in the plot
    "text_to_image_R@1": "R@1, text to image",
    "text_to_image_R@10": "R@10, text to image",
    "image_to_text_R@1": "R@1, image to text",
    "image_to_text_R@10": "R@10, image to text",
}
STYLE = """
    .gradio-container {width: 100% !important; max-width: 1100px !important; margin: auto}
    .grid-wrap {max-height: none !important}
    footer {display: none !important}
"""
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no fonts to download


def uploaded_path(payload):
    """The path of an uploaded picture; None if nothing was uploaded.

    A request can name any path, so only a file in gradio's upload folder is accepted. A path elsewhere gets the same answer as
    a missing file, and is rejected before the disk or (for \\\\HOST\\FILE on Windows) another machine is accessed.
    Raises gr.Error for any other path, and for a file that is larger than an upload can be.
    """
    if not payload or not payload.path:
        return None
    folder = Path(get_upload_folder()).resolve()
    try:
        inside = Path(os.path.abspath(payload.path)).is_relative_to(folder)
        path = Path(payload.path).resolve() if inside else None  # follows symbolic links
        if path and path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= MAX_UPLOAD * 2**20:
            return str(path)
    except (OSError, ValueError):  # not a valid file name
        pass
    message = f"no such upload, or more than {MAX_UPLOAD} MB; drop the picture again"
    raise gr.Error(message, duration=None, print_exception=False)


async def unchanged(path):
    return path


def picture_field():
    """A field to drop a picture into. Its value is the path of the uploaded file, so that we read the file, not gradio."""
    field = gr.Image(label="Drop a picture", sources=["upload", "clipboard"], height=300)
    field.preprocess = uploaded_path
    field.async_move_resource_to_block_cache = unchanged  # otherwise gradio would download any URL that a request names
    return field


def picture_grid():
    return gr.Gallery(show_label=False, columns=4, height="auto", object_fit="cover", interactive=False)


def show_errors(function):
    """The function, but with `UserError`s shown on the page."""

    def wrapped(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            raise gr.Error(str(error).replace("--image ", ""), duration=None, print_exception=False) from None

    return wrapped


def tiles(gallery, embedding):
    """The best matches of an embedding, (d_e,), as [(picture, title)] for a grid."""
    matches = []
    for name, score in best_matches(gallery, embedding, gallery.paths, NUM_SHOWN):
        with contextlib.suppress(OSError, ValueError):  # deleted or changed since it was embedded
            matches.append((read_image(name, TILE_PIXELS), f"{score:.2f}  {Path(name).name}"))
    return matches


def add_text_tab(model, gallery):
    """A tab that finds pictures by a text."""

    def find(text, minus):  # each is None if a request leaves it out
        return tiles(gallery, embed_query(model, [text or ""], [minus] if minus and minus.strip() else []))

    with gr.Tab("Words"):
        with gr.Row():
            text = gr.Textbox(label="Pictures that show", placeholder="a red circle left of a star", scale=3, autofocus=True)
            minus = gr.Textbox(label="but not", placeholder="a square", scale=1)
            button = gr.Button("Search", variant="primary", scale=0, min_width=110)
        grid = picture_grid()
        gr.on([button.click, text.submit, minus.submit], show_errors(find), [text, minus], grid, api_name="find")


def add_picture_tab(model, gallery, captions, caption_embeddings, device, dtype):
    """A tab that finds the best captions of a picture, and the pictures most similar to it."""

    def look(path):
        if not path:
            return None, None
        embedding = embed_file(model, path, device, dtype)
        matches = best_matches(caption_embeddings, embedding, captions, NUM_CAPTIONS)
        rows = "".join(f"<tr><td>{score:.2f}</td><td>{html.escape(caption)}</td></tr>" for caption, score in matches)
        return f"<h4>Its best captions</h4><table>{rows}</table>", tiles(gallery, embedding)

    with gr.Tab("A picture"):
        with gr.Row():
            picture = picture_field()
            caption_table = gr.HTML()
        grid = picture_grid()
        picture.change(show_errors(look), picture, [caption_table, grid], api_name="look")


def add_class_tab(model, device, dtype):
    """A tab that classifies a picture zero-shot."""

    def decide(path, names):
        names = [name.strip() for name in (names or "").replace("\n", ",").split(",") if name.strip()]
        if not path or len(names) < 2:
            raise UserError("drop a picture and name at least two classes, with commas between them")
        if len(names) > MAX_CLASSES:
            raise UserError(f"{len(names)} classes; the limit is {MAX_CLASSES}")
        return dict(classify_embedding(model, embed_file(model, path, device, dtype), names))

    with gr.Tab("Classes"), gr.Row():
        picture = picture_field()
        with gr.Column():
            names = gr.Textbox(label="Classes, with commas between them", placeholder="a circle, a star, a ring")
            button = gr.Button("Which is it?", variant="primary")
            bars = gr.Label(label="Probabilities", show_heading=False)
        gr.on([button.click, names.submit], show_errors(decide), [picture, names], bars, api_name="decide")


def add_curves_tab(history):
    """A tab with the curves of the training."""
    with gr.Tab("The run"):
        recalls = history.rename(columns=CURVES).melt("epoch", CURVES.values(), "recall", "percent")
        gr.LinePlot(recalls, x="epoch", y="percent", color="recall", title="Recall on the validation images", y_lim=[0, 100])
        gr.LinePlot(history, x="epoch", y="loss", title="Training loss", height=220)


def build_page(run, model, gallery, captions, caption_embeddings, history, device, dtype):
    """The page, a gr.Blocks.

    gallery: of `gallery.open_gallery`; the page shows no other pictures of this machine. captions: m strings, with
    caption_embeddings, (m, d_e). history: the run's history.csv as a table, or None.
    """
    with gr.Blocks(title=f"CLIP: {run}", analytics_enabled=False, delete_cache=(CACHE_CHECK, CACHE_AGE)) as page:
        gr.Markdown(f"## Search {len(gallery.paths):,} pictures\nwith the model in `{run}`")
        add_text_tab(model, gallery)
        add_picture_tab(model, gallery, captions, caption_embeddings, device, dtype)
        add_class_tab(model, device, dtype)
        if history is not None:
            add_curves_tab(history)
    return page


def launch(page, host, port, wait=True):
    """Serves the page. wait: return only when the page is stopped. Raises OSError if the port is in use."""
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        max_file_size=f"{MAX_UPLOAD}mb",
        share=False,
        quiet=not wait,
        theme=THEME,
        css=STYLE,
    )


def serve(
    run: str = "",
    images: str = "",
    host: str = "127.0.0.1",
    port: int = 7860,
    cache_dir: str = ".cache",
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
):
    """Serves a page to find pictures by text, find captions and similar pictures, classify, and see the training curves.

    Args:
        run: run folder; empty: the newest in runs/
        images: folder to search, with its subfolders; empty: the run's own validation pictures
        host: address to listen on; 0.0.0.0 lets other machines connect
        port: port to listen on
        cache_dir: folder where embeddings are cached
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
    """
    run = run or newest_run()
    model, device, dtype = open_model(run, device, precision)
    gallery = open_gallery(model, *files_to_search(run, images), cache_dir, device, dtype, num_workers)
    captions, caption_embeddings = embed_captions(model, run, cache_dir, device, dtype)
    history = Path(run) / "history.csv"
    history = pd.read_csv(history) if history.exists() else None
    page = build_page(run, model, gallery, captions, caption_embeddings, history, device, dtype)
    try:
        launch(page, host, port)
    except OSError:
        raise UserError(f"--host {host} --port {port}: cannot be opened; is the port in use? name another") from None


if __name__ == "__main__":
    run_command(lambda: run_cli(serve, "app.py", sys.argv[1:], EXAMPLES))
