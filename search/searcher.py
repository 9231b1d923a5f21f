"""A run, to search with. torch and the encoders take seconds to load, so they are loaded only when they are needed.

A text query needs the text encoder only, which is kept in the cache (`search.text_session`), and the name of the gallery. Their
cache keys are kept in a small file, which is named after the sizes and times of the run's files.
"""

import contextlib
import json
import os
import shutil
import threading
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from config import HUBNESS_FILE, is_model_name, run_names
from search.relevance import JSON_FILE, load_relevance, relevance_folder
from search.store import FORMAT
from utils.cache import cache_key, file_stats, model_key, note_use
from utils.errors import UserError
from utils.files import HOST, read_bytes, write_json
from utils.images import VIEW, decode_image

RUN_FILES = "config.json", "model.safetensors", "tokenizer.json", HUBNESS_FILE


def first_line(error):
    return f"{error}".strip().partition("\n")[0][:160]


class Searcher:
    """Embeds the texts and pictures of a search. run, device, precision, views: as on the command line.

    cache_dir: of embeddings.

    Attributes: opened, (model, device, dtype), which is loaded when it is first used; keys, {"gallery", "text", "captions",
    "dtype", "width"}: the cache keys of pictures' vectors, the text encoder and captions' vectors, the precision, and the width
    of a vector, d_e + 1. What vectors are, `search.queries` says.
    Raises UserError where there is no such run, in the attributes and methods, too.
    """

    def __init__(self, run, device="auto", precision="auto", cache_dir=".cache", views=1):
        self.run, self.device, self.precision, self.cache_dir = str(run), str(device), precision, Path(cache_dir)
        names = run_names(run)
        self.views, self.folders = views, [Path(name) for name in names]
        self.lock, self.loaded = threading.Lock(), None
        self.is_folder = not any(map(is_model_name, names)) and all(map(Path.is_dir, self.folders))

    @property
    def opened(self):
        with self.lock:  # of several threads that need it first, one loads it
            if not self.is_loaded:
                from embedding import open_model  # only here: this import takes seconds

                self.loaded = open_model(self.run, self.device, self.precision, self.views)
            return self.loaded

    @property
    def is_loaded(self):
        return self.loaded is not None

    @property
    def model(self):
        return self.opened[0]

    @cached_property
    def keys(self):
        if not self.is_loaded and self.is_folder:
            try:
                return json.loads(self.keys_path().read_text(encoding="utf-8"))
            except (OSError, ValueError):  # the first search, or another version's file
                pass
        model, _, dtype = self.opened
        image_keys = model_key(model.image_encoder), model_key(model.image_projection)
        text_keys = model_key(model.text_encoder), model_key(model.text_projection)
        hubness = model.hubness and model.hubness.key
        keys = {
            "gallery": cache_key(*image_keys, VIEW, dtype, FORMAT, hubness, self.views),
            "text": cache_key(*text_keys),
            "captions": cache_key(*text_keys, hubness),
            "dtype": str(dtype),
            "width": model.image_projection.out_features + 1,
        }
        if self.is_folder:
            with contextlib.suppress(UserError):  # a cache that cannot be written is named when the gallery is opened
                write_json(self.keys_path(), keys)
                self.note_use(self.keys_path())
        return keys

    def keys_path(self):
        stats = file_stats([folder / name for folder in self.folders for name in RUN_FILES]), self.views
        machine = HOST, os.environ.get("CUDA_VISIBLE_DEVICES"), "own precision"  # which decide what "auto" means
        return self.cache_dir / f"run-{cache_key(stats, self.device, self.precision, machine, VIEW, FORMAT)}.json"

    @property
    def width(self):
        return self.keys["width"]

    def gallery_path(self):
        """The path of the `Store` with the pictures' vectors of this run."""
        return self.cache_dir / f"gallery-{self.keys['gallery']}.sqlite"

    def captions_path(self, captions):
        """The path of the vectors of some captions."""
        return self.cache_dir / f"captions-{cache_key(self.keys['captions'], self.keys['dtype'], captions)}.npy"

    def session_path(self):
        return self.cache_dir / f"text-{self.keys['text']}"

    @cached_property
    def session(self):
        """The `TextSession` that was kept; None where there is none."""
        if not self.session_path().is_dir():
            return None
        from search.text_session import TextSession  # only here: it is not needed where the model is loaded

        try:
            return TextSession(self.session_path())
        except Exception as error:  # the library's own types; a damaged file, or one of another version
            print(f"{self.session_path()}: cannot be read ({first_line(error)}); the whole model is loaded")
            shutil.rmtree(self.session_path(), ignore_errors=True)
            return None

    def embed_texts(self, texts):
        """m texts -> (m, d_e) float32, L2-normalised."""
        if not self.is_loaded and self.is_folder and self.session:
            return self.session.embed(list(texts))
        from embedding import embed_texts  # only here: this import takes seconds

        return embed_texts(self.model, texts).numpy()

    def embed_captions(self, captions):
        """m captions -> their vectors, (m, d_e + 1) float32; in the run's precision, as for training."""
        from embedding import text_features, text_vectors, token_ids

        model, device, dtype = self.opened
        T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
        return text_vectors(model, T_f, device).numpy()

    @cached_property
    def relevance(self):
        """The run's `Relevance`, or None. For an ensemble, several views or an older run a line says how to get one."""
        folder = relevance_folder(self.run, self.cache_dir, self.views)
        found = load_relevance(folder)
        if not found and (self.views > 1 or len(self.folders) > 1 or (folder / JSON_FILE).exists()):
            flags = f"--run {self.run}" + f" --views {self.views}" * (self.views > 1)
            print(f"no match probabilities; python evaluate.py calibrate {flags} learns them")
        return found

    def embed_file(self, path):
        """The query of one picture file to pictures, (d_e + 1,) float32. Raises UserError where it cannot be read."""
        if Path(path).is_dir():
            raise UserError(f"{path}: is a folder; --image and --similar-to name a picture, --images a folder")
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        return self.embed_picture(read_bytes(path), path)

    def embed_picture(self, contents, name):
        """The same from the bytes of a picture file of this name."""
        from embedding import image_features, project_and_normalize

        model, device, dtype = self.opened
        try:
            picture = decode_image(contents, model.image_encoder.size, model.image_encoder.resize, Path(name).suffix)
        except (ValueError, OSError) as error:
            raise UserError(f"{name}: {error}") from None
        I_f = image_features(model, [picture], device, dtype, 1)
        I_e = project_and_normalize(model.image_projection, I_f, device)[0].numpy()
        return np.append(I_e, np.float32(0))

    def save_text_encoder(self):
        """Writes the text encoder for later queries, after a search that had to load the whole model."""
        if not self.is_loaded or not self.is_folder or self.model.open_clip or self.session_path().exists():
            return
        from search.text_session import write_text_session

        print("saving the text encoder to the cache; the next text query starts faster", flush=True)
        try:
            write_text_session(self.model, self.folders[0], self.session_path())
            self.note_use(self.session_path())
        except Exception as error:  # a full disk, or a text encoder that torch.onnx cannot export, in many types
            print(f"it was not saved: {first_line(error)}")

    def note_use(self, *paths):
        if self.is_folder:
            for folder, path in product(self.folders, paths):
                note_use(folder, path)
