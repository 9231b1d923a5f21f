"""Search the pictures of a folder with a trained model.

connections.py   bounds on connections to the page
duplicates.py    files that are the same photograph
export.py        export the two encoders to ONNX
files.py         the picture files of a folder, or in tar files
gallery.py       the pictures of a folder and their embeddings
hashes.py        perceptual hashes of pictures, cached on disk
index.py         nearest-neighbour search, exact or approximate
live.py          a gallery that is searched while it grows
map.html         the page of a map
map.py           a map of a picture collection
occlusion.py     heat maps: which parts of a picture match a text
page/            what the browser gets: HTML, CSS and JavaScript
options.py       the flags of inference.py and app.py
queries.py       embed and answer queries: texts, pictures, class names
relevance.py     how probably a picture matches a text
run_data.py      the pictures and captions that a run was trained with
searcher.py      a run, to search with: loads no more of it than a search needs
server.py        the page's server
show.py          what a search says and draws
store.py         what is kept of a gallery on disk
text_session.py  a run's text encoder without torch
update.py        embed what is new in a gallery, and recognise what was moved
"""
