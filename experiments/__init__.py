"""Train the variants of a lesson and compare them: what is behind lessons.py. It stands above the commands and imports them.

materials.py  what a lesson needs besides the sample: other samples, pretrained encoders, generated pictures
measures.py   what is measured on a trained model
report.py     results.json, table.md and plot.png
runner.py     a lesson, its trainings, and the processes that run them
"""
