"""Folders on disk -> checked, split batches."""

from mrl.data.audit import Audit, BadImage, audit_source, changed_files, load_audit
from mrl.data.folds import Folds, make_folds, read_folds, split_of, write_folds
from mrl.data.images import header_of, read_image
from mrl.data.loading import ImageCache, ImageSet, make_loader
from mrl.data.records import ImageRecord
from mrl.data.sources import IMAGE_SUFFIXES, ImageSource, Sample, list_images, load_source
from mrl.data.split import SplitRow, check_split, make_split, read_split, split_units, write_split
from mrl.data.transforms import Augment, Preprocess, make_augment

__all__ = [
    "IMAGE_SUFFIXES",
    "Audit",
    "Augment",
    "BadImage",
    "Folds",
    "ImageCache",
    "ImageRecord",
    "ImageSet",
    "ImageSource",
    "Preprocess",
    "Sample",
    "SplitRow",
    "audit_source",
    "changed_files",
    "check_split",
    "header_of",
    "list_images",
    "load_audit",
    "load_source",
    "make_augment",
    "make_folds",
    "make_loader",
    "make_split",
    "read_folds",
    "read_image",
    "read_split",
    "split_of",
    "split_units",
    "write_folds",
    "write_split",
]
