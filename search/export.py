"""Export a run's two encoders, with their projection heads, to ONNX files: python inference.py --export onnx --run RUN.

ONNX files can be used without torch.
"""

import copy
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils.files import atomic_write, require_own_file

PRODUCER = "CLIP on captioned pictures"  # in each file, by which it is recognised
EXAMPLE_BATCH = 2  # pictures and captions in the example input that the export traces


class ImageExport(nn.Module):
    """Pixels, (n, 3, size, size) float of 0 to 255, to embeddings, (n, d_e), L2-normalised."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.projection = model.image_encoder, model.image_projection

    def forward(self, image):
        return F.normalize(self.projection(self.encoder(image)), dim=1)


class TextExport(nn.Module):
    """Token ids and their attention mask, (n, l) int64, to embeddings, (n, d_e), L2-normalised."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.projection = model.text_encoder, model.text_projection

    def forward(self, input_ids, attention_mask):
        return F.normalize(self.projection(self.encoder.pooled(input_ids, attention_mask)), dim=1)


def export_onnx(model, folder):
    """Writes onnx/image.onnx and onnx/text.onnx into a folder, and returns their paths. Both accept any batch size.

    Raises UserError where there are others that were not written here.

    Captions have to be padded to the context length if the text encoder has a fixed one.
    """
    size = model.image_encoder.size
    image = torch.zeros(EXAMPLE_BATCH, 3, size, size)
    paths = [Path(folder) / "onnx" / f"{name}.onnx" for name in ("image", "text")]
    for path in paths:
        require_own_file(path, is_own_onnx, "--export")
    export(ImageExport(model.cpu()), (image,), {"image": {0: torch.export.Dim("n")}}, paths[0])
    export_text(model, paths[1])
    return paths


def export_text(model, path):
    """Writes a copy of the text encoder with its projection head; the model stays on its device."""
    n, length = torch.export.Dim("n"), torch.export.Dim("l", max=model.tokenizer.truncation["max_length"])
    ids = torch.full((EXAMPLE_BATCH, 5), model.tokenizer.padding["pad_id"])
    shapes = {"input_ids": {0: n, 1: length}, "attention_mask": {0: n, 1: length}}
    export(copy.deepcopy(TextExport(model)).cpu(), (ids, torch.ones_like(ids)), shapes, path)


def is_own_onnx(path):
    """Whether a file is an ONNX file that was written here."""
    with open(path, "rb") as file:
        return PRODUCER.encode() in file.read(256)  # it comes before the graph


def export(module, example, shapes, path):
    """Writes a module, of which example is the input and shapes its axes of any length, as an ONNX file."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # ids and mask share the axes n and l, as intended
        names = {"input_names": list(shapes), "output_names": [f"{path.stem}_features"]}
        program = torch.onnx.export(module.eval(), example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    program.model.producer_name = PRODUCER
    atomic_write(path, lambda temporary: program.save(str(temporary), external_data=False))
