"""Where pictures and captions come from: each kind is read by one reader, into the same rows.

captions_files.py  captions files of every layout
columns.py         which columns of a table are images and captions, and the captions in a row or a cell
names.py           names in a captions file to files in a folder
official.py        Flickr8k's official split: recognise its images, and find its lists
splits.py          which split an image is in, by lists, a column, Karpathy's JSON or a hash of its name
tables.py          tables with quotation marks, or without where they should be
tars.py            pictures and captions of tar files (WebDataset), also as img2dataset writes them
trained.py         which pictures a run was trained on, recognised by their bytes
"""
