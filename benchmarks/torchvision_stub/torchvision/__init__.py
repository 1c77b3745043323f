"""Names that mosaicml-streaming imports for datasets of images, which the benchmark does not read.

The real torchvision is of one build of torch, and would bring another torch into the environment of a peer.
"""
