"""PyTorch Lightning experiments made of parts that anyone can run, watch and take home."""

__version__ = "0.1.0"
