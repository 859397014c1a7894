"""Networks registered with timm, and models from names, files and functions."""

from mrl.models.build import build_from_recipe, build_model, model_names, preprocess_of, weights_are_own
from mrl.models.classifier import Classifier
from mrl.models.net import MRLNet
from mrl.models.original import convert_original

__all__ = [
    "Classifier",
    "MRLNet",
    "build_from_recipe",
    "build_model",
    "convert_original",
    "model_names",
    "preprocess_of",
    "weights_are_own",
]
