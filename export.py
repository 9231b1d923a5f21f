"""A run's towers as ONNX files, which run without torch: python inference.py --export onnx --run RUN."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from storage import UserError, write_whole

EXAMPLE = 2  # pictures and captions that the export traces


class ImageTower(nn.Module):
    """Pixels, (n, 3, size, size) float of 0 to 255, to embeddings, (n, d_e) of length 1."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.projection = model.image_encoder, model.image_projection

    def forward(self, image):
        return F.normalize(self.projection(self.tower(image)), dim=1)


class TextTower(nn.Module):
    """Token ids and their mask, (n, l) int64, to embeddings, (n, d_e) of length 1."""

    def __init__(self, model):
        super().__init__()
        self.tower, self.projection = model.text_encoder, model.text_projection

    def forward(self, input_ids, attention_mask):
        return F.normalize(self.projection(self.tower.pooled(input_ids, attention_mask)), dim=1)


def export_onnx(model, run):
    """Writes RUN/onnx/image.onnx and RUN/onnx/text.onnx, and returns their paths. Any number of pictures or captions goes in.

    Captions have to be padded to the tower's context where it is fixed. Raises UserError where onnx is missing.
    """
    try:
        import onnx  # noqa: F401  only here: few need them
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--export onnx: pip install onnx onnxscript") from None
    model = model.cpu().eval()
    n, length = torch.export.Dim("n"), torch.export.Dim("l", max=model.tokenizer.truncation["max_length"])
    size = model.image_encoder.size
    image = torch.zeros(EXAMPLE, 3, size, size)
    ids = torch.full((EXAMPLE, 5), model.tokenizer.padding["pad_id"])
    mask = torch.ones_like(ids)
    parts = {
        "image": (ImageTower(model), (image,), {"image": {0: n}}),
        "text": (TextTower(model), (ids, mask), {"input_ids": {0: n, 1: length}, "attention_mask": {0: n, 1: length}}),
    }
    written = []
    for name, (tower, example, shapes) in parts.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name")  # the mask has the same n and l as the ids: so it should
            names = {"input_names": list(shapes), "output_names": [f"{name}_features"]}
            program = torch.onnx.export(tower.eval(), example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        path = Path(run) / "onnx" / f"{name}.onnx"
        write_whole(path, lambda temporary, program=program: program.save(str(temporary), external_data=False))
        written.append(path)
    return written
