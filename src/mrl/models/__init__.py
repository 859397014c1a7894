"""Networks registered with timm, and models from names, files and functions."""

from mrl.models.original import convert_original

__all__ = ["convert_original"]
