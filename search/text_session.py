"""A run's text encoder without torch, for queries: in ONNX Runtime it starts in half a second instead of several."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

from utils.files import atomic_dir

BATCH = 64  # texts that are encoded at once
FILES = "text.onnx", "tokenizer.json"


class TextSession:
    """Embeds texts with the files that `write_text_session` wrote into a folder."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False  # it grows with each new length of texts, and never shrinks
        options.intra_op_num_threads = 1  # a query is too short to share out, and many may come at once
        path = Path(folder) / FILES[0]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / FILES[1]))

    def embed(self, texts):
        """m texts -> (m, d_e) L2-normalised embeddings, fp32."""
        blocks = []
        for start in range(0, len(texts), BATCH):
            encodings = self.tokenizer.encode_batch(texts[start : start + BATCH])  # pads to the longest
            ids, mask = (np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
            blocks += self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        return np.concatenate(blocks)


def write_text_session(model, run_dir, folder):
    """Writes a model's text encoder and the tokenizer of its run folder for a `TextSession`, all or nothing."""
    from search.export import export_text  # only here: it imports torch

    folder = Path(folder)
    with atomic_dir(folder) as temporary:
        export_text(model, temporary / FILES[0])
        shutil.copyfile(Path(run_dir) / FILES[1], temporary / FILES[1])
