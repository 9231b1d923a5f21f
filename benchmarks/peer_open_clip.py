"""open_clip's own trainer (`open_clip_train`) for benchmarks/peers.py: its files, its command, and its embeddings.

open_clip takes a model as a folder with a configuration and weights. Its Hugging Face text encoders include no DistilBERT, so
MiniLM is written back in BERT's layout, which gives the same features.
"""

import io
import json
import shutil
import sys
import tarfile

import open_clip
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

CONTEXT_LENGTH = 40  # tokens, to which it pads every caption; its default of 77 would only cost time
NUM_SHARDS = 30
BERT_KEYS = {  # DistilBERT's names: BERT's
    "transformer.layer": "encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def write_bert(distilbert, folder):
    """Writes a DistilBERT folder in BERT's layout, with its tokenizer, into folder."""
    config = json.loads((distilbert / "config.json").read_text(encoding="utf-8"))
    state = load_file(distilbert / "model.safetensors")
    for old, new in BERT_KEYS.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    state["embeddings.token_type_embeddings.weight"] = torch.zeros(2, config["dim"])
    bert = transformers.BertConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["dim"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        intermediate_size=config["hidden_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        pad_token_id=config["pad_token_id"],
    )
    bert = transformers.BertModel(bert, add_pooling_layer=False)
    bert.load_state_dict(state)
    bert.save_pretrained(folder)
    for path in distilbert.glob("*token*"):
        shutil.copy(path, folder)


def write_model(folder, image_weights, distilbert, size, embed_dim=256):
    """Writes an open_clip model with the two pretrained encoders and new linear projections. size: of pictures, in pixels."""
    folder.mkdir(parents=True)
    write_bert(distilbert, folder)
    vision = {"timm_model_name": image_weights.stem, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}
    text = {"hf_model_name": str(folder), "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    text |= {"hf_tokenizer_name": str(folder), "context_length": CONTEXT_LENGTH}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": size}
    config = {"model_cfg": {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    trunk = {key: value for key, value in load_file(image_weights).items() if not key.startswith("classifier")}
    model.visual.trunk.load_state_dict(trunk)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")


def write_shards(folder, pairs, image_dir):
    """Writes (image name, caption) pairs as 30 WebDataset tars in the given order."""
    folder.mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:04}.tar", "w") as tar:
            for number in range(shard, len(pairs), NUM_SHARDS):
                image, caption = pairs[number]
                for ending, data in (("jpg", (image_dir / image).read_bytes()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def command(model, shards, folder, flags):
    """The command line that trains with open_clip_train and keeps a checkpoint every 2,048 pairs, which it calls an epoch."""
    data = f"{shards}/{{0000..{NUM_SHARDS - 1:04}}}.tar"
    fixed = ["--model", f"local-dir:{model}", "--train-data", data, "--dataset-type", "webdataset", "--dataset-resampled"]
    fixed += ["--train-num-samples", 2048, "--logs", folder, "--name", "run", "--device", "cpu", "--workers", 1]
    fixed += ["--precision", "amp_bf16", "--warmup", 10]
    return [sys.executable, "-m", "open_clip_train.main", *fixed, *flags]


@torch.inference_mode()
def embed(model_folder, checkpoint, paths, captions):
    """(I_e, T_e) of pictures and captions, as open_clip embeds them with a checkpoint."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    open_clip.load_checkpoint(model, str(checkpoint))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        pictures = [torch.stack([preprocess(Image.open(p)) for p in paths[i : i + 100]]) for i in range(0, len(paths), 100)]
        I_e = torch.cat([model.encode_image(batch, normalize=True).float() for batch in pictures])
        texts = tokenizer(list(captions)).split(250)
        T_e = torch.cat([model.encode_text(batch, normalize=True).float() for batch in texts])
    return I_e, T_e
