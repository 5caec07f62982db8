"""The scale suite: speedup over tuned rivals against the size of the model. Each run is a cell, with its own file.

config.py    the models and the options, without torch
model.py     the transformers
text.py      the text, its vocabulary and its tokens
images.py    the images and their networks
rivals.py    optimizers, and how they are tuned
cells.py     a cell, its file, and what speedup means here
train.py     the run of a cell
plan.py      what is missing, the most telling per minute first
suite.py     the suite: ``Scale``
figures.py   from cells to figures
report.py    tables
plots.py     the picture
"""
