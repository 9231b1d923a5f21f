"""Train the variants of a lesson and compare them: what is behind lessons.py. It stands above the commands and imports them.

lesson.py     a lesson, and the flags of lessons.py
materials.py  what a lesson needs besides the sample: other samples, pretrained encoders, generated pictures
measures.py   what is measured on a trained model
report.py     results.json, table.md and plot.png
runner.py     the trainings of a lesson, and the processes that run them
"""
