"""A page to search pictures with: python app.py [--run RUN] [--images FOLDER], then http://127.0.0.1:7860 in a browser."""

import contextlib
import html
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it asks the network for its newest version

import gradio as gr
import pandas as pd
from gradio.utils import get_upload_folder

from config import parse_flags
from dataset import read_image
from embedding import open_model
from gallery import open_gallery
from inference import (
    SHOWN_CAPTIONS,
    best_matches,
    classify_embedding,
    embed_captions,
    embed_file,
    embed_query,
    files_to_search,
    newest_run,
)  # fmt: skip
from storage import UserError, run_command

SHOWN, SHOWN_PIXELS = 12, 320  # matches, and their shorter side
MOST_CLASSES = 50
MAX_UPLOAD = 20  # MB
CACHE_CHECK, CACHE_AGE = 60, 600  # seconds between looks for old uploads and results in the temporary folder, and what is old
CURVES = {
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
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none that a network has


def uploaded_path(payload):
    """The path of an uploaded picture; None where there is none.

    A request can name any path, so only a file in gradio's upload folder counts. What lies elsewhere is answered as what
    does not exist, and before anything asks the disk or, as for \\\\HOST\\FILE on Windows, another machine.
    Raises gr.Error for any other path, and for a file that is too large to be an upload.
    """
    if not payload or not payload.path:
        return None
    folder = Path(get_upload_folder()).resolve()
    try:
        inside = Path(os.path.abspath(payload.path)).is_relative_to(folder)
        path = Path(payload.path).resolve() if inside else None  # where symbolic links lead
        if path and path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= MAX_UPLOAD * 2**20:
            return str(path)
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise gr.Error(
        f"no such upload, or more than {MAX_UPLOAD} MB; drop the picture again", duration=None, print_exception=False
    )


async def as_it_is(path):
    return path


def picture_field():
    """A field to drop a picture into, which gives the path of what was uploaded: what cannot be read we refuse in our words."""
    field = gr.Image(label="Drop a picture", sources=["upload", "clipboard"], height=300)
    field.preprocess = uploaded_path
    field.async_move_resource_to_block_cache = as_it_is  # else gradio would fetch any address that a request names
    return field


def in_words(function):
    """The function with its `UserError`s shown on the page."""

    def shown(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            raise gr.Error(str(error).replace("--image ", ""), duration=None, print_exception=False) from None

    return shown


def build_page(run, model, gallery, captions, caption_embeddings, history, device, dtype):
    """The page, a gr.Blocks.

    gallery: of `gallery.open_gallery`, the only pictures that it ever shows beside an upload. captions: m strings, with
    caption_embeddings, (m, d_e). history: the run's history.csv as a table, None where it has none.
    """

    def tiles(embedding):
        shown = []
        for name, score in best_matches(gallery.searched, embedding, gallery.paths, SHOWN):
            with contextlib.suppress(OSError, ValueError):  # deleted or changed since it was embedded
                shown.append((read_image(name, SHOWN_PIXELS), f"{score:.2f}  {Path(name).name}"))
        return shown

    def find(text, without):  # None where a request leaves one out
        return tiles(embed_query(model, [text or ""], [without] if without and without.strip() else []))

    def look(path):
        if not path:
            return None, None
        embedding = embed_file(model, path, device, dtype)
        found = best_matches(caption_embeddings, embedding, captions, SHOWN_CAPTIONS)
        rows = "".join(f"<tr><td>{score:.2f}</td><td>{html.escape(caption)}</td></tr>" for caption, score in found)
        return f"<h4>Its best captions</h4><table>{rows}</table>", tiles(embedding)

    def decide(path, names):
        names = [name.strip() for name in (names or "").replace("\n", ",").split(",") if name.strip()]
        if not path or len(names) < 2:
            raise UserError("drop a picture and name at least two classes, with commas between them")
        if len(names) > MOST_CLASSES:
            raise UserError(f"{len(names)} classes; {MOST_CLASSES} are the most")
        return dict(classify_embedding(model, embed_file(model, path, device, dtype), names))

    grid = partial(gr.Gallery, show_label=False, columns=4, height="auto", object_fit="cover", interactive=False)
    with gr.Blocks(title=f"CLIP: {run}", analytics_enabled=False, delete_cache=(CACHE_CHECK, CACHE_AGE)) as page:
        gr.Markdown(f"## Search {len(gallery.paths):,} pictures\nwith the model in `{run}`")
        with gr.Tab("Words"):
            with gr.Row():
                text = gr.Textbox(
                    label="Pictures that show", placeholder="a red circle left of a star", scale=3, autofocus=True
                )
                without = gr.Textbox(label="but not", placeholder="a square", scale=1)
                button = gr.Button("Search", variant="primary", scale=0, min_width=110)
            found = grid()
            gr.on([button.click, text.submit, without.submit], in_words(find), [text, without], found, api_name="find")
        with gr.Tab("A picture"):
            with gr.Row():
                shown = picture_field()
                said = gr.HTML()
            alike = grid()
            shown.change(in_words(look), shown, [said, alike], api_name="look")
        with gr.Tab("Classes"):
            with gr.Row():
                subject = picture_field()
                with gr.Column():
                    names = gr.Textbox(label="Classes, with commas between them", placeholder="a circle, a star, a ring")
                    answer = gr.Button("Which is it?", variant="primary")
                    bars = gr.Label(label="Probabilities", show_heading=False)
            gr.on([answer.click, names.submit], in_words(decide), [subject, names], bars, api_name="decide")
        if history is not None:
            with gr.Tab("The run"):
                long = history.rename(columns=CURVES).melt("epoch", CURVES.values(), "recall", "percent")
                gr.LinePlot(
                    long, x="epoch", y="percent", color="recall", title="Recall on the validation images", y_lim=[0, 100]
                )
                gr.LinePlot(history, x="epoch", y="loss", title="Training loss", height=220)
    return page


def launch(page, host, port, wait=True):
    """Serves the page, and waits until it is stopped, or returns at once. Raises OSError where the port is in use."""
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
    """Opens a page: words to pictures, a picture to captions and look-alikes, a picture to classes, and the run's curves.

    Args:
        run: run folder; empty: the newest under runs/
        images: folder to search, with its subfolders; empty: the run's own validation pictures
        host: address to bind to; 0.0.0.0 lets other machines in
        port: of that address
        cache_dir: folder where embeddings are kept
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
    """
    run = run or newest_run()
    model, device, dtype = open_model(run, device, precision)
    files = files_to_search(run, images)
    gallery = open_gallery(model, files, images or None, cache_dir, device, dtype, num_workers)
    captions, caption_embeddings = embed_captions(model, run, cache_dir, device, dtype)
    history = Path(run) / "history.csv"
    history = pd.read_csv(history) if history.exists() else None
    page = build_page(run, model, gallery, captions, caption_embeddings, history, device, dtype)
    try:
        launch(page, host, port)
    except OSError:
        raise UserError(
            f"--host {host} --port {port}: cannot be opened; another program has it, so name another port"
        ) from None


if __name__ == "__main__":
    run_command(lambda: parse_flags(serve, "app.py", None, sys.argv[1:]))
