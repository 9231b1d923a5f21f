"""Images and captions to encoder features, and features to embeddings."""

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import clip
from config import run_names
from dataset import pad
from encoders.ensemble import EnsembleEncoder, EnsembleHead, require_same_inputs
from encoders.hubness import EnsembleHubness
from encoders.precision import own_dtype
from encoders.stages import run_from_stage
from utils.device import autocast, pick_device, pick_dtype, speed_up_cpu
from utils.errors import UserError
from utils.images import as_batch, read_images, view_crops

IMAGE_BATCH, TEXT_BATCH = 64, 256  # batch sizes; they change memory and speed, not results


def open_model(run, device, precision, views=1):
    """(model, device, dtype) to embed with, as training embeds. run, device, precision, views: as on the command line.

    Several runs with commas between them become one model, an ensemble (`encoders.ensemble`).
    Raises UserError where there is no such run or device, or where the runs take different inputs.
    """
    speed_up_cpu()
    device, names = pick_device(device), run_names(run)
    models = [clip.load(name, device)[0].to(memory_format=torch.channels_last) for name in names]
    model = models[0]
    if len(models) > 1:
        require_same_inputs(models, names)
        model = ensemble(models).eval().to(device)
    model.views = views
    return model, device, own_dtype(names, models, device) if precision == "auto" else pick_dtype(precision, device)


def ensemble(models):
    """The CLIPModel of several, which take the same inputs: its scores are the mean of theirs."""
    widths = [part.image_projection.out_features for part in models]
    images, texts = (EnsembleEncoder([getattr(part, name) for part in models]) for name in ("image_encoder", "text_encoder"))
    model = clip.CLIPModel(images, texts, models[0].tokenizer, sum(widths))
    model.image_projection = EnsembleHead([part.image_projection for part in models], images.widths)
    model.text_projection = EnsembleHead([part.text_projection for part in models], texts.widths)
    model.logit_scale.data = torch.stack([part.logit_scale.data for part in models]).mean()
    model.open_clip = next((part.open_clip for part in models if part.open_clip), None)
    if any(part.hubness for part in models):
        model.hubness = EnsembleHubness([part.hubness for part in models], widths)
    return model


@torch.no_grad()
def image_feature_batches(model, pictures, device, dtype, total):
    """Yields the image encoder's features, (n, d_i), fp32, on the CPU, batch by batch.

    pictures: an iterable of about `total` uint8 arrays from `utils.images`. The model's number of views says which crops of
    each are encoded; their features are averaged.
    """
    model.eval()
    encoder, pictures = model.image_encoder, iter(pictures)
    with tqdm(total=total, desc="images", leave=False, disable=None, unit="img") as progress:
        while batch := list(islice(pictures, IMAGE_BATCH // model.views)):
            image = as_batch([crop for picture in batch for crop in view_crops(picture, encoder.size, model.views)])
            with autocast(device, dtype):
                features = encoder(image.to(device)).float().cpu().unflatten(0, (len(batch), -1)).mean(dim=1)
            progress.update(len(batch))
            yield features


def image_features(model, pictures, device, dtype, total):
    """All that `image_feature_batches` yields, (n, d_i); n is 0 where there are no pictures."""
    batches = image_feature_batches(model, pictures, device, dtype, total)
    return torch.cat([torch.empty(0, model.image_encoder.width), *batches])


@torch.no_grad()
def activation_features(model, activations, device, dtype):
    """n activations of the image encoder's trunk, (n, ...) -> its features, (n, d_i), fp32, on the CPU."""
    model.eval()
    features = torch.empty(len(activations), model.image_encoder.width)
    for start in tqdm(range(0, len(activations), IMAGE_BATCH), desc="images", leave=False, disable=None):
        rows = slice(start, start + IMAGE_BATCH)
        with autocast(device, dtype):
            features[rows] = run_from_stage(model.image_encoder, activations[rows].to(device)).float().cpu()
    return features


def images_for(model, paths, num_workers):
    """`utils.images.read_images` as the model's image encoder wants them."""
    return read_images(paths, model.image_encoder.size, num_workers, model.image_encoder.resize)


def file_features(model, paths, device, dtype, num_workers=0, skip_bad=False):
    """(I_f, bad) of image files: `image_features` of the readable ones, and {position: what is wrong} of the others.

    Raises UserError for an unreadable file unless skip_bad, and where none can be read.
    """
    bad = {}

    def pictures():
        for position, (picture, problem) in enumerate(images_for(model, paths, num_workers)):
            if problem and not skip_bad:
                raise UserError(f"{problem}; fix or remove it, or pass --skip-bad")
            if problem:
                bad[position] = problem
            else:
                yield picture

    I_f = image_features(model, pictures(), device, dtype, len(paths))
    if not len(I_f):
        raise UserError(f"{Path(paths[0]).parent}: none of its {len(paths)} pictures can be decoded")
    return I_f, bad


@torch.no_grad()
def text_features(model, texts, device, dtype):
    """m lists of token ids -> the text encoder's features, (m, d_t), fp32, on the CPU."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # captions of similar length need little padding
    features = torch.empty(len(texts), model.text_encoder.width)
    for start in tqdm(range(0, len(order), TEXT_BATCH), desc="captions", leave=False, disable=None):
        rows = order[start : start + TEXT_BATCH]
        input_ids, attention_mask = pad([texts[i] for i in rows], model.tokenizer.padding["pad_id"])
        with autocast(device, dtype):
            features[rows] = model.text_encoder(input_ids.to(device), attention_mask.to(device)).float().cpu()
    return features


def embed_texts(model, texts):
    """m texts -> (m, d_e) L2-normalised embeddings, in fp32, on the CPU."""
    device = model.logit_scale.device
    T_f = text_features(model, token_ids(model.tokenizer, texts), device, torch.float32)
    return project_and_normalize(model.text_projection, T_f, device)


@torch.no_grad()
def project_and_normalize(head, features, device):
    """An encoder's features, (n, d), through its projection head: L2-normalised (n, d_e) embeddings, on the CPU."""
    head.eval()
    return F.normalize(head(features.to(device)), dim=1).cpu()


def picture_vectors(model, I_f, device):
    """Image features, (n, d_i) -> (n, d_e + 1): L2-normalised embeddings, and minus a share of their hubness."""
    I_e = project_and_normalize(model.image_projection, I_f, device)
    hubness = model.hubness.of_pictures(I_e) if model.hubness else torch.zeros(len(I_e))
    return torch.cat([I_e, -hubness[:, None]], dim=1)


def text_vectors(model, T_f, device):
    """The same of text features, (m, d_t) -> (m, d_e + 1)."""
    T_e = project_and_normalize(model.text_projection, T_f, device)
    hubness = model.hubness.of_texts(T_e) if model.hubness else torch.zeros(len(T_e))
    return torch.cat([T_e, -hubness[:, None]], dim=1)


def pair_scores(T_v, I_v):
    """The (m, n) scores of m texts with n pictures: cosines minus the hubness of both. T_v, I_v: vectors as above."""
    return cosines(T_v, I_v) + T_v[:, -1:] + I_v[:, -1]


def cosines(T_v, I_v):
    """Those of the embeddings in m and n vectors, (m, n): in torch for arrays, too, as NumPy's products round differently."""
    product = torch.as_tensor(T_v)[:, :-1] @ torch.as_tensor(I_v)[:, :-1].T
    return product if isinstance(T_v, torch.Tensor) else product.numpy()


def token_ids(tokenizer, captions):
    """m captions -> m lists of token ids without padding."""
    encodings = tokenizer.encode_batch(list(captions))
    return [[i for i, real in zip(encoding.ids, encoding.attention_mask) if real] for encoding in encodings]
