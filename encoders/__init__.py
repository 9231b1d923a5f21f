"""Image encoders and text encoders.

build.py        create encoders from a name, a weight file or sizes: timm for images, Hugging Face for text
cbow.py         a bag of words as a text encoder
convolution.py  faster convolutions on a CPU, with the same results
hub.py          download from a model hub, with a short timeout
openclip.py     open_clip's pretrained models
stages.py       cut an image encoder at a stage, and take features from several stages
text_mixer.py   an MLP-Mixer as a text encoder
tokenizer.py    captions to token ids
"""
