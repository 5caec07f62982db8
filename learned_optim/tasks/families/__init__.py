"""The families of the zoo, one module per kind of work; each lists its own in ``FAMILIES``.

bootstrapped.py            values of decision processes, with targets made of the network's own predictions
categorical.py             tables with columns of categories
changing.py                targets or inputs that switch along the run, or drift
contrastive.py             encoders that know the other view of a picture, of a row, or its caption
convnext.py                depthwise convolutions with layer scale, on augmented images
embeddings.py              recommenders and word vectors: large embeddings of which most rows are hit rarely
fine_tuning.py             classifiers of images and models of text that were trained on other ones before
fine_tuning_tables.py      perceptrons that were trained on another table before
forecasting.py             generated series: linear models, convolutions in time, patches, recurrent networks
graphs.py                  generated graphs: labels of nodes, full batch; missing links
language.py                characters and words: n-gram perceptrons, recurrent networks, transformers; also validation's
noise.py                   networks at their solution or near it, under noise
physics.py                 differential equations: losses that hold derivatives
sequence_to_sequence.py    invented translations: recurrent networks with attention, transformers
synthetic.py               quadratics, factorisations, toy problems, streams that are drawn afresh
tabular.py                 tables, imitated networks, recommenders; also validation's
validation_changing.py     validation's targets that switch several times
validation_control.py      validation's values of decisions, bootstrapped
validation_fine_tuning.py  validation's networks that were trained before
validation_structures.py   validation's expressions that are translated, and its molecules
validation_users.py        validation's differential equations, sessions and series
vision.py                  convolutions, autoencoders, vision transformers on digits, strokes, faces and photographs
vision_perceptrons.py      perceptrons on the same images
vision_validation.py       validation's images
"""
