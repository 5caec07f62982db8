"""The families of the zoo, one module per kind of work; each module lists its own in ``FAMILIES``.

====================  ==============================================================================================
module                what its networks do
====================  ==============================================================================================
bootstrapped          values of decision processes, with targets made of the network's own predictions
categorical           tables with columns of categories
changing              targets or inputs that switch along the run, or drift
contrastive           encoders that know the other view of a picture, of a row, or its caption
convnext              depthwise convolutions with layer scale, on augmented images
embeddings            recommenders and word vectors: large embeddings of which most rows are hit rarely
fine_tuning           classifiers of images and models of text that were trained on other ones before
fine_tuning_tables    perceptrons that were trained on another table before
forecasting           generated series: linear models, convolutions in time, patches, recurrent networks
graphs                generated graphs: labels of nodes, full batch; missing links
language              characters and words: n-gram perceptrons, recurrent networks, transformers; also validation's
noise                 networks at their solution or near it, under noise
physics               differential equations: losses that hold derivatives
sequence_to_sequence  invented translations: recurrent networks with attention, transformers
synthetic             quadratics, factorisations, toy problems, streams that are drawn afresh
tabular               tables, imitated networks, recommenders; also validation's
vision                convolutions, autoencoders, vision transformers on digits, strokes, faces and photographs
vision_perceptrons    perceptrons on the same images
vision_validation     validation's images
====================  ==============================================================================================
"""
