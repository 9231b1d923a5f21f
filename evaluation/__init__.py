"""Score a trained model: the tasks of evaluate.py.

compare.py    models side by side: recall, accuracy, speed and size
geometry.py   alignment and uniformity of embeddings
leaks.py      find pictures that are in two splits, by name or as near-duplicates
options.py    the tasks of evaluate.py and their flags
relevance.py  learn how probably a picture matches a text
retrieval.py  Recall@K, and which of several captions matches an image
spans.py      what people type when they search, made from captions
splits.py     which images and captions are scored, and their similarities
sts.py        semantic textual similarity: correlation of cosines with human ratings
twins.py      word order: which of two scenes a caption describes, where both captions have the same words
zeroshot.py   zero-shot classification of pictures by the names of their classes
"""
