"""Networks registered with timm, and models from names, files and functions."""

from mrl.models.classifier import Classifier
from mrl.models.net import MRLNet
from mrl.models.original import convert_original

__all__ = ["Classifier", "MRLNet", "convert_original"]
