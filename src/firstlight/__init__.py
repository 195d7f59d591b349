"""PyTorch Lightning experiments made of parts that you can run, watch and use in your own project."""

__version__ = "0.1.0"
