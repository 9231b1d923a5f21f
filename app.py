"""A page to search pictures with: python app.py [--run RUN] [--images FOLDER], then http://127.0.0.1:7860 in a browser."""

import html
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it asks the network for its newest version

import gradio as gr
import pandas as pd

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
LARGEST_UPLOAD = "20mb"
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


def picture_field():
    """A field to drop a picture into, which gives the path of what was uploaded: what cannot be read we refuse in our words."""
    field = gr.Image(label="Drop a picture", sources=["upload", "clipboard"], height=300)
    field.preprocess = lambda payload: payload and payload.path
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
        matches = best_matches(gallery.searched, embedding, gallery.paths, SHOWN)
        return [(read_image(name, SHOWN_PIXELS), f"{score:.2f}  {Path(name).name}") for name, score in matches]

    def find(text, without):
        return tiles(embed_query(model, [text], [without] if without.strip() else []))

    def look(path):
        if not path:
            return None, None
        embedding = embed_file(model, path, device, dtype)
        found = best_matches(caption_embeddings, embedding, captions, SHOWN_CAPTIONS)
        rows = "".join(f"<tr><td>{score:.2f}</td><td>{html.escape(caption)}</td></tr>" for caption, score in found)
        return f"<h4>Its best captions</h4><table>{rows}</table>", tiles(embedding)

    def decide(path, names):
        names = [name.strip() for name in names.replace("\n", ",").split(",") if name.strip()]
        if not path or len(names) < 2:
            raise UserError("drop a picture and name at least two classes, with commas between them")
        if len(names) > MOST_CLASSES:
            raise UserError(f"{len(names)} classes; {MOST_CLASSES} are the most")
        return dict(classify_embedding(model, embed_file(model, path, device, dtype), names))

    grid = partial(gr.Gallery, show_label=False, columns=4, height="auto", object_fit="cover", interactive=False)
    with gr.Blocks(title=f"CLIP: {run}", analytics_enabled=False) as page:
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
        max_file_size=LARGEST_UPLOAD,
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
