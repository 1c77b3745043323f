"""Base classes of datasets of images."""


class VisionDataset:
    """Never used."""
