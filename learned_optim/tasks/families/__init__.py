"""The families of the zoo, one module per kind of work; each module lists its own in ``FAMILIES``.

====================  ==============================================================================================
module                what its networks do
====================  ==============================================================================================
language              characters and words: n-gram perceptrons, recurrent networks, transformers; also validation's
synthetic             quadratics, factorisations, toy problems, streams that are drawn afresh
tabular               tables, imitated networks, recommenders; also validation's
vision                convolutions, autoencoders, vision transformers on digits, strokes, faces and photographs
vision_perceptrons    perceptrons on the same images
vision_validation     validation's images
====================  ==============================================================================================
"""
