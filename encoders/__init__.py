"""Image encoders and text encoders.

build.py        create encoders from a name, a weight file or sizes: timm for images, Hugging Face for text
cbow.py         a bag of words as a text encoder
convolution.py  faster convolutions on a CPU, with the same results
ensemble.py     several models as one
hub.py          download from a model hub, with a short timeout, and save copies for one
hubness.py      correct scores for pictures that are near to most texts
openai.py       what programs use of OpenAI's clip beside the model
openclip.py     open_clip's pretrained models
precision.py    the precision that models were trained in
simple_tokenizer.py  OpenAI's tokenizer, as a class
stages.py       cut an image encoder at a stage, and take features from several stages
text.py         what differs between Hugging Face's text models
text_mixer.py   an MLP-Mixer as a text encoder
tokenizer.py    captions to token ids
"""

from utils.lean_imports import without_compiler, without_sharding

with without_compiler():  # here, so that no file below loads more of them
    import timm  # noqa: F401

    with without_sharding():
        import transformers.masking_utils
        import transformers.modeling_utils  # noqa: F401
