"""Search the pictures of a folder with a trained model.

export.py     export the two encoders to ONNX
gallery.py    embed the pictures of a folder, and cache the embeddings on disk
index.py      nearest-neighbour search, exact or approximate
map.html      the page of a map
map.py        a map of a picture collection
occlusion.py  heat maps: which parts of a picture match a text
queries.py    embed and answer queries: texts, pictures, class names
store.py      what is kept of a gallery on disk
"""
